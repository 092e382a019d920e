"""A part held by one process at a time, under the plan that it is of."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chimera.cli import say
from chimera.convert.build.plan import BuildPlan, load_plan
from chimera.files import is_locked, lock_file


class Busy(Exception):
    """Another process is at the part."""


def lock_at(folder: Path) -> Path:
    """The lock of the part that lies in `folder`."""
    return folder.with_suffix(".lock")


def at_work(folder: Path) -> bool:
    """Whether some process is at the part that lies in `folder`."""
    return is_locked(lock_at(folder))


@contextmanager
def held_part(work: Path, stream: str, index: int, build: str | None) -> Iterator[tuple[BuildPlan, Path]]:
    """Hold a part; yields its plan and its folder.

    `build` is the id of the plan that the part is of, where another may take its place. Raises `Busy` where another
    process holds the part, `FileNotFoundError` where the plan is gone.
    """
    plan = _plan(work, build)
    folder = plan.streams[stream].part_folder(work, index)
    with lock_file(lock_at(folder), wait=False) as ours:
        if not ours:
            raise Busy
        _plan(work, build)  # whoever replaces a plan waits for the locks of its parts
        yield plan, folder


@contextmanager
def left_alone(folder: Path) -> Iterator[None]:
    """Hold a part of a plan that goes, once a worker that outlived its build has let it go."""
    with lock_file(lock_at(folder), wait=False) as free:
        if free:
            yield
            return
    say(f"{folder}: a process of the build that goes is still at this part: waiting for its end")
    with lock_file(lock_at(folder), wait=True):
        yield


def _plan(work: Path, build: str | None) -> BuildPlan:
    plan = load_plan(work)
    if build not in (None, plan.id):
        raise FileNotFoundError(errno.ENOENT, "another plan has taken its place", str(work / "plan.json"))
    return plan
