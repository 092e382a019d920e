"""Where parts run: processes of this machine, or Ray tasks on a cluster. What runs is `part.run_part` either way.

A worker that dies (killed, out of memory, its node gone) is an event like any other: its part can be given to
another, which goes on from the last commit.
"""

import contextlib
import errno
import os
import signal
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process, resource_tracker
from pathlib import Path
from typing import Any

from chimera.cli import FULL, REFUSED, UserError
from chimera.convert.build.part import Progress, Report, run_part
from chimera.convert.build.part_lock import Busy
from chimera.convert.settings import cores

EVERY = 0.25  # seconds between a part's reports, or a fast one would keep the builder busy
CRASHED = "it was ended by"  # and a signal's name: how a worker is lost, but not for its memory


@dataclass(frozen=True)
class Task:
    """A part to do, under the plan whose id is `build`; `limit` is the train tokens it may hold."""

    stream: str
    part: int
    limit: int | None
    build: str | None = None


@dataclass(frozen=True)
class Event:
    """What became of a task.

    `progress` (payload: Progress), `done`, `busy` (another process is at the part), `failed` (payload: an exception to
    raise) or `lost` (payload: how).
    """

    kind: str
    task: Task
    payload: Any = None


class Executor(ABC):
    """Runs parts inside its `with` block."""

    slots: int  # tasks it runs at a time

    def __enter__(self) -> "Executor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def start(self, task: Task) -> None: ...

    @abstractmethod
    def wait(self, seconds: float) -> list[Event]:
        """What happened; waits at most `seconds` for something to happen."""

    @abstractmethod
    def cancel(self, task: Task) -> None:
        """Stop a running task; no more is heard of it. It may go on until `close` returns."""

    @abstractmethod
    def close(self) -> None:
        """Stop every task and wait until none runs; the parts' commits make that safe."""


def seldom(report: Report, every: float = EVERY) -> Report:
    """A report that sums up what it is given, and hands it on once in `every` seconds, the first at once."""
    waiting, last = Progress(), -every

    def sparse(moved: Progress) -> None:
        nonlocal waiting, last
        waiting, now = Progress(waiting.bytes + moved.bytes, waiting.tokens + moved.tokens), time.monotonic()
        if now - last >= every:
            report(waiting)
            waiting, last = Progress(), now

    return sparse


def failure(error: BaseException, work: Path) -> Exception:
    """An exception of a part as one to raise in the builder: what the user can fix as `UserError`."""
    if isinstance(error, UserError):
        return UserError(str(error))
    if isinstance(error, OSError) and (trouble := disk_trouble(error, work)):
        return trouble
    return RuntimeError("a worker failed:\n" + "".join(traceback.format_exception(error)))


_FIXABLE = (*REFUSED, errno.EEXIST, errno.ENOENT, errno.ENOTEMPTY)  # of the folders that a build has made


def disk_trouble(error: OSError, where: Path) -> UserError | None:
    """What the system refused to do with a file, where the user can fix it; `where` if it does not say which."""
    if error.errno not in _FIXABLE:
        return None
    if error.errno in (errno.EMFILE, errno.ENFILE):
        wrong = "too many open files: raise `ulimit -n` or lower `workers`"
    elif error.errno in FULL:
        wrong = f"no space left for {error.filename or where}: free some"
    else:
        wrong = f"{error.filename or where}: {error.strerror}: fix it"
    return UserError(f"{wrong} and run the same command again; it goes on where it stopped")


class LocalExecutor(Executor):
    """One process a slot, started when first needed and again when it died."""

    def __init__(self, workers: int, work: Path) -> None:
        self.slots = workers
        self._work = work
        self._context = get_context("spawn")  # a fork would copy the threads' locks of pyarrow and tokenizers
        self._idle: list[tuple[Any, Any]] = []  # (process, connection)
        self._busy: dict[Any, tuple[Any, Task]] = {}  # connection -> (process, task)

    def start(self, task: Task) -> None:
        while self._idle:
            process, conn = self._idle.pop()
            if process.is_alive():
                break
        else:
            process, conn = self._spawn()
        self._busy[conn] = (process, task)
        with contextlib.suppress(OSError):  # it died just now: `wait` tells
            conn.send(task)

    def wait(self, seconds: float) -> list[Event]:
        events: list[Event] = []
        for ready in connection.wait(list(self._busy), seconds):
            conn: Any = ready
            process, task = self._busy[conn]
            try:
                kind, payload = conn.recv()
            except (EOFError, OSError):
                process.join()
                del self._busy[conn]
                events.append(Event("lost", task, _cause(process.exitcode)))
                continue
            if kind != "progress":
                del self._busy[conn]
                self._idle.append((process, conn))
            events.append(Event(kind, task, payload))
        return events

    def cancel(self, task: Task) -> None:
        for conn, (process, running) in list(self._busy.items()):
            if running == task:
                process.kill()
                process.join()
                del self._busy[conn]

    def close(self) -> None:
        for _, conn in self._idle:
            with contextlib.suppress(OSError):  # it died while it had nothing to do
                conn.send(None)  # a worker without work can end in good order
        for task in [task for _, task in self._busy.values()]:
            self.cancel(task)
        for process, _ in self._idle:
            process.join(2)
            process.kill()
            process.join()
        self._idle = []

    def _spawn(self) -> tuple[Any, Any]:
        ours, theirs = self._context.Pipe()
        threads = str(max(1, cores() // self.slots))  # of `tokenizers`, in each process; NumPy needs none of its own
        process = self._context.Process(target=_work, args=(theirs, self._work), daemon=True)
        with _environment(RAYON_NUM_THREADS=threads, OPENBLAS_NUM_THREADS="1"), _without_interrupts():
            process.start()
        theirs.close()
        return process, ours


def _cause(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"it ended with code {exitcode}"
    if -exitcode == signal.SIGKILL:
        return "it was killed (SIGKILL), which the system does when memory runs out"
    return f"{CRASHED} {signal.Signals(-exitcode).name}"


class _environment:
    """Environment variables for the processes started inside the block."""

    def __init__(self, **values: str) -> None:
        self._values = {key: value for key, value in values.items() if key not in os.environ}

    def __enter__(self) -> None:
        os.environ.update(self._values)

    def __exit__(self, *_: object) -> None:
        for key in self._values:
            os.environ.pop(key, None)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started inside the block hear no Ctrl-C, which the builder decides the meaning of."""
    resource_tracker.ensure_running()  # which a first start would do, and lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(conn: Any, work: Path) -> None:
    """The life of a local worker: tasks in, events out, until the builder is gone."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while task := conn.recv():
        report = seldom(lambda moved: conn.send(("progress", moved)))
        try:
            run_part(work, task.stream, task.part, task.limit, report, task.build)
            conn.send(("done", None))
        except Busy:
            conn.send(("busy", None))
        except BaseException as error:  # a panic of a library in Rust is no `Exception`
            conn.send(("failed", failure(error, work)))


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
