"""A `python` and a `composer` that start at once: forks of a process that has imported torch, Composer and the like.

Those imports take 5 to 7 s of a core, and the tests start a hundred processes. What starts here is a process of its
own all the same: arguments, environment, folder, streams, mounts, signals and exit code are its caller's, and the
project is imported anew from where it would be. Not its own are what libraries read of the environment while they are
imported, the hash seed, the parent and the last tidying of its memory. So tests of kills, of memory and of imports
start the real ones, and so does README's test, which runs each command.
"""

import atexit
import ctypes
import gc
import importlib
import json
import multiprocessing.process
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

# Hands over what it was started with, passes signals on, and ends as the fork does.
STAND_IN = """#!{python} -ISE
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as server, open("/proc/self/ns/mnt") as mounts:
    server.connect({address!r})
    asked = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(asked).to_bytes(4, "big")], [0, 1, 2, mounts.fileno()])
    server.sendall(asked)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: server.sendall(bytes([number])))
    code = int.from_bytes(server.recv(4), "big", signed=True)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if code != -signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


class Warm:
    """The process that forks; `folder` holds the two stand-ins. Not `ready` where an import starts threads."""

    def __init__(self, folder: Path) -> None:
        self.folder, address = folder, str(folder / "socket")
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        clean["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # the one thread that an import would start
        command = [sys.executable, __file__, address]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}  # the first ends it, also where we are killed
        self._process = subprocess.Popen(command, env=clean, start_new_session=True, **pipes)
        for name in ("python", "composer"):
            (folder / name).write_text(STAND_IN.format(python=sys.executable, address=address))
            (folder / name).chmod(0o755)
        self.ready = self._process.stdout.readline() == b"ready\n"

    def stop(self) -> None:
        self._process.communicate()


def serve(address: str) -> tuple[bytes, list[int]]:
    """Fork for each caller, in one loop without threads; returns in a fork alone, with what it is asked to be."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes.fileno())
    selector = selectors.DefaultSelector()
    for source in (listening, woken, 0):
        selector.register(source, selectors.EVENT_READ)
    callers: dict[int, socket.socket] = {}
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj == 0:
                os._exit(0)
            elif key.fileobj is listening:
                caller = listening.accept()[0]
                head, handed, *_ = socket.recv_fds(caller, 4, 4)
                with caller.makefile("rb") as file:
                    asked = file.read(int.from_bytes(head, "big"))
                if (child := os.fork()) == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for other in (selector, listening, woken, wakes, caller, *callers.values()):
                        other.close()
                    return asked, handed
                for number in handed:
                    os.close(number)
                callers[child] = caller
                selector.register(caller, selectors.EVENT_READ, child)
            elif key.fileobj is woken:
                woken.recv(4096)
                while callers and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    caller = callers.pop(ended[0])
                    with suppress(KeyError):
                        selector.unregister(caller)
                    with caller, suppress(OSError):
                        caller.sendall(os.waitstatus_to_exitcode(ended[1]).to_bytes(4, "big", signed=True))
            elif key.data in callers:
                said = key.fileobj.recv(1)
                os.kill(key.data, said[0] if said else signal.SIGKILL)  # nothing said: the stand-in was killed
                if not said:
                    selector.unregister(key.fileobj)


def run(asked: bytes, handed: list[int]) -> NoReturn:
    """What the caller started, to its end as the interpreter ends it: threads, exit functions, streams."""
    try:
        become(asked, handed)
        code: Any = 0
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            code = print(code, file=sys.stderr) or 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 255)


def become(asked: bytes, handed: list[int]) -> None:
    """Run what the caller started, in its place."""
    (name, *words), folder, environment = json.loads(asked)
    for number, given in enumerate(handed[:3]):
        os.dup2(given, number)
    if not os.path.sameopenfile(handed[3], os.open("/proc/self/ns/mnt", os.O_RDONLY)):
        assert ctypes.CDLL(None, use_errno=True).setns(handed[3], 0x20000) == 0, os.strerror(ctypes.get_errno())
    os.closerange(3, max(handed) + 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    multiprocessing.process.ORIGINAL_DIR = folder
    sys.executable = str(Path(name).with_name("python"))
    unbuffered = words[:1] == ["-u"]
    words = words[unbuffered:]
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1 if unbuffered or os.isatty(1) else -1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.path[:1] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if Path(name).name == "composer":
        from composer.cli.launcher import main

        sys.argv = [name, *words]
        sys.exit(main())
    if words[0] == "-m":
        import runpy

        sys.path.insert(0, os.getcwd())
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    if words[0] == "-c":
        text, sys.argv, where = words[1], ["-c", *words[2:]], "<string>"
        sys.path.insert(0, "")
    elif words[0] == "-":
        text, sys.argv, where = sys.stdin.read(), words, "<stdin>"
        sys.path.insert(0, "")
    else:
        text, sys.argv, where = Path(words[0]).read_text(encoding="utf-8"), words, str(Path(words[0]).absolute())
        module.__file__ = where  # which processes it starts import
        sys.path.insert(0, str(Path(where).resolve().parent))
    exec(compile(text, where, "exec"), module.__dict__)


if __name__ == "__main__":
    for name in ("composer.cli.launcher", "streaming", "omegaconf", "pydantic"):
        importlib.import_module(name)
    assert importlib.import_module("transformers").LlamaForCausalLM  # imported when asked for
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("the tests start their commands anew: a fork has none of the threads that the imports started")
    gc.freeze()
    run(*serve(sys.argv[1]))
