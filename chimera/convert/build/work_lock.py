"""The lock of a build's work folder, and the record in it of who holds it.

The lock is the kernel's (`flock`), so it ends with its process. Some network file systems keep such locks on each
machine alone. So the record names the machine, and its file's time of change is a sign of life: a builder that gets
the lock while the record names another machine first sees whether that time still moves.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from chimera.cli import UserError, say
from chimera.files import is_at, try_lock

LOCK = "lock"
BEAT = 10.0  # seconds between signs of life
PATIENCE = 3 * BEAT  # seconds without one, after which a builder of another machine counts as killed
SETTLING = 2.0  # seconds, in which records that are written at the same time have become visible to all


class Locked(UserError):
    """Another process holds the work folder."""


@dataclass(frozen=True)
class Holder:
    """Who holds a work folder. `since` is the clock of that machine, to be shown and never decided by."""

    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def lock_of(
    work: Path, many: bool = False, beat: float = BEAT, patience: float = PATIENCE, settling: float = SETTLING
) -> Iterator[bool]:
    """Hold the work folder, made if need be and removed if it ends empty; yields whether nobody else did.

    Of `many` processes that ask at the same time, on several machines, one gets it even where the file system keeps no
    locks between machines; the others raise `UserError`. So does one that comes later, if it is not of the machine that
    holds the folder (see `holder_of`).
    """
    made = [folder for folder in (work, work.parent) if not folder.exists()]
    work.mkdir(parents=True, exist_ok=True)
    lock, ours = work / LOCK, False
    try:
        with open(lock, "ab") as file:
            if not (try_lock(file.fileno(), lock) and is_at(lock, file.fileno())):
                yield False
                return
            try:
                _see_whether_it_is_gone(work, patience)
                with _signs_of_life(work, file.fileno(), beat, settling if many else 0.0):
                    ours = True
                    yield True
            finally:
                if ours and [*work.iterdir()] == [lock]:
                    lock.unlink()
    finally:
        with suppress(OSError):  # it holds work; or it is a link
            work.rmdir()
            for folder in made[1:]:
                folder.rmdir()


def holder_of(work: Path) -> Holder | None:
    """Who holds the work folder, or held it when it was killed; `None` where it was let go, or never held."""
    with suppress(FileNotFoundError, ValueError, TypeError, AttributeError):  # a record that is just being written
        return Holder(**json.loads((work / LOCK).read_bytes()))
    return None


def last_sign(work: Path) -> float | None:
    """When the holder gave its last sign of life, in seconds of the file system's clock."""
    with suppress(FileNotFoundError), open(work / LOCK, "rb") as file:  # opened: or NFS answers from what it has kept
        return os.fstat(file.fileno()).st_mtime
    return None


def empty(work: Path) -> None:
    """Remove what the work folder holds, but for its lock, which `lock_of` removes."""
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _see_whether_it_is_gone(work: Path, patience: float) -> None:
    """Raise `UserError` where a builder of another machine is alive, though we got its lock."""
    holder = holder_of(work)
    if holder is None or holder.host == os.uname().nodename:
        return
    say(f"{work} was not let go by {holder}: waiting {patience:g} s for a sign of life from there")
    before, until = last_sign(work), time.monotonic() + patience
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(1.0, left))
        if last_sign(work) != before:
            raise _keeps_no_locks(work, holder)


@contextmanager
def _signs_of_life(work: Path, descriptor: int, beat: float, settling: float) -> Iterator[None]:
    """Write who we are into the lock, and touch it every `beat` seconds, until the `with` ends."""
    mine = Holder(os.uname().nodename, os.getpid(), datetime.now().astimezone().isoformat(timespec="seconds"))
    (work / LOCK).write_bytes(json.dumps(asdict(mine)).encode() + b"\n")
    if settling:
        time.sleep(settling)
        found = holder_of(work)
        if found and found.host != mine.host:
            raise _keeps_no_locks(work, found)
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(beat):
            with suppress(OSError):  # the next may work
                os.utime(descriptor)

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        os.ftruncate(descriptor, 0)


def _keeps_no_locks(work: Path, holder: Holder) -> UserError:
    return UserError(
        f"{work} is held by {holder}, and its file system keeps no locks between machines: let one machine build at a "
        "time, or give `work` on a file system that does (Lustre: mounted with `flock`)"
    )
