/* Preloaded: the FAULT_AT-th call on a file below FAULT_ROOT fails with FAULT_ERRNO (once a process, or always after). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_long calls;

static int fails(const char *kind, const char *path) {
    const char *root = getenv("FAULT_ROOT"), *at = getenv("FAULT_AT"), *kinds = getenv("FAULT_CALLS");
    if (!root || !at || !path || strncmp(path, root, strlen(root)) || (kinds && !strstr(kinds, kind))) return 0;
    long n = ++calls, wanted = atol(at);
    if (n < wanted || (n > wanted && !getenv("FAULT_ALWAYS"))) return 0;
    errno = atoi(getenv("FAULT_ERRNO"));
    const char *log = getenv("FAULT_LOG");
    if (log) { int saved = errno; FILE *f = fopen(log, "a"); if (f) { fprintf(f, "%s %s\n", kind, path); fclose(f); } errno = saved; }
    return 1;
}

static int fails_fd(const char *kind, int fd) {
    char name[64], path[4096];
    if (!getenv("FAULT_ROOT")) return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(name, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return fails(kind, path);
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define ON_FD(type, name, kind, args, given) type name args { REAL(name); return fails_fd(kind, fd) ? -1 : real given; }
#define OPEN(name) int name(const char *path, int flags, ...) { \
    REAL(name); va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list); \
    return fails("open", path) ? -1 : real(path, flags, mode); }

ON_FD(ssize_t, read, "read", (int fd, void *b, size_t n), (fd, b, n))
ON_FD(ssize_t, pread, "read", (int fd, void *b, size_t n, off_t o), (fd, b, n, o))
ON_FD(ssize_t, pread64, "read", (int fd, void *b, size_t n, off64_t o), (fd, b, n, o))
ON_FD(ssize_t, write, "write", (int fd, const void *b, size_t n), (fd, b, n))
ON_FD(ssize_t, pwrite64, "write", (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o))
ON_FD(int, fsync, "fsync", (int fd), (fd))
ON_FD(int, fdatasync, "fsync", (int fd), (fd))
ON_FD(int, ftruncate64, "truncate", (int fd, off64_t n), (fd, n))
OPEN(open)
OPEN(open64)
int rename(const char *from, const char *to) { REAL(rename); return fails("rename", to) ? -1 : real(from, to); }
int unlink(const char *path) { REAL(unlink); return fails("unlink", path) ? -1 : real(path); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return fails("mkdir", path) ? -1 : real(path, mode); }
