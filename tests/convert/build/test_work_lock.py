"""One process holds a work folder, says that it lives, and on file systems without locks between machines too."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chimera.cli import UserError
from chimera.convert.build.work_lock import LOCK, Holder, holder_of, last_sign, lock_of

ELSEWHERE = Holder("another-machine", 7, "2026-11-29T10:00:00+00:00")


def held_elsewhere(work: Path) -> None:
    """What a builder of another machine shows of itself where its lock is not seen."""
    work.mkdir()
    (work / LOCK).write_text(json.dumps(vars(ELSEWHERE)))


@contextmanager
def alive(work: Path) -> Iterator[None]:
    """That builder's signs of life."""
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(0.01):
            os.utime(work / LOCK)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_holder_is_named_while_it_holds_and_lives(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with lock_of(work, beat=0.01) as free:
        assert free
        holder, first = holder_of(work), last_sign(work)
        assert holder is not None
        assert (holder.host, holder.pid) == (os.uname().nodename, os.getpid())
        while last_sign(work) == first:
            pass
        with lock_of(work) as again:
            assert not again
        assert holder_of(work) == holder
        (work / "work").touch()
    assert (work / LOCK).read_bytes() == b""
    assert holder_of(work) is None


def test_a_folder_without_work_goes_with_its_lock(tmp_path: Path) -> None:
    with lock_of(tmp_path / "work") as free:
        assert free
    assert not (tmp_path / "work").exists()


def test_a_builder_that_was_killed_on_another_machine_is_waited_for_and_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_elsewhere(tmp_path / "work")
    with lock_of(tmp_path / "work", patience=0.05) as free:
        assert free
        found = holder_of(tmp_path / "work")
        assert found is not None
        assert found.pid == os.getpid()
    assert "was not let go by process 7 on another-machine, since" in capsys.readouterr().err


def test_a_builder_that_lives_on_another_machine_is_left_alone(tmp_path: Path) -> None:
    work = tmp_path / "work"
    held_elsewhere(work)
    with alive(work):
        with pytest.raises(UserError, match="its file system keeps no locks between machines"), lock_of(work):
            raise AssertionError("taken")
        assert holder_of(work) == ELSEWHERE


def test_of_many_that_ask_at_once_one_gets_it_without_locks_too(tmp_path: Path) -> None:
    """Each gets the lock of its own machine; the last to write its record stays."""
    work, written = tmp_path / "work", threading.Event()

    def another() -> None:
        while holder_of(work) is None:
            pass
        (work / LOCK).write_text(json.dumps(vars(ELSEWHERE)))
        written.set()

    thread = threading.Thread(target=another)
    thread.start()
    with pytest.raises(UserError, match="keeps no locks between machines"), lock_of(work, many=True, settling=1):
        raise AssertionError("taken")
    thread.join()
    assert written.is_set()
    assert holder_of(work) == ELSEWHERE
