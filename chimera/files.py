"""Files on a local disk that several processes use, any of which may be killed: whole files, and locks.

A file is written under a temporary name in the same folder and renamed, so its name always leads to the old content
or to the new, never to a part of it. A lock is the kernel's (`flock`): it ends with the process that holds it, however
that ends, so there are no stale ones.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal

Sync = Literal["name", "bytes", "nothing"]


@contextmanager
def open_whole(path: Path, sync: Sync = "name", temporary: Path | None = None) -> Iterator[BinaryIO]:
    """A new file to write, which takes the place of `path` at the end of the `with`; after an error nothing is changed.

    A killed process leaves `path` as it was, and the temporary file, which the next writer overwrites. So writers of
    one `path` at the same time need a lock, or each its own `temporary`.

    Args:
        path: the file; its folder exists.
        sync: what a power cut may take back, which costs up to two waits for the disk. `name`: nothing, the new file
            is there once this ends (what others rely on from then on: shards, states, plans). `bytes`: the new file
            as a whole, for the old one (what the next start would do again: a log cut to its checkpoint). `nothing`
            is synced: the file may come back empty (what can be had again: a download, a report).
        temporary: a name in the folder of `path`, instead of `.NAME.tmp`.
    """
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            if sync != "nothing":
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # or it would hide what went wrong
            temporary.unlink()
        raise
    if sync == "name":
        _sync_folder(path.parent)


def write_whole(path: Path, data: bytes, sync: Sync = "name") -> None:
    """Make `path` hold `data`, or leave it as it was and raise `OSError` (a full disk included). See `open_whole`."""
    with open_whole(path, sync) as file:
        file.write(data)


def move_file(file: Path, path: Path) -> None:
    """Move `file`, whose bytes are synced, to `path`, also to another disk; whole and durable as by `write_whole`."""
    try:
        os.replace(file, path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with open_whole(path) as out, open(file, "rb") as data:
            shutil.copyfileobj(data, out)
        file.unlink()
    else:
        _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock_file(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock file `path`, made if need be; yields whether it is ours, False where another process holds it.

    With `wait` it is ours once they are done, unless they removed the file: then others may hold one made since.
    """
    with open(path, "a") as file:
        yield try_lock(file.fileno(), path, wait) and is_at(path, file.fileno())


def try_lock(descriptor: int, path: Path, wait: bool = False) -> bool:
    """Lock an open file or folder until it is closed; False where another process holds it and we do not `wait`.

    Raises `OSError` that names `path` on a file system without locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        raise OSError(errno.ENOLCK, "the file system has no locks", str(path)) from None
    return True


def is_locked(path: Path) -> bool:
    """Whether a process of this machine, or of any where locks are kept between them, holds the lock file `path`.

    Raises `OSError` where that cannot be asked: no permission to write to it, a file system without locks.
    """
    try:
        with open(path, "r+b") as file:  # a lock over NFS needs a file that is open for writing
            return not try_lock(file.fileno(), path)
    except FileNotFoundError:
        return False


def is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
