"""Whole files and locks, between real processes that are killed."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import pytest

from chimera import files
from chimera.files import Sync, lock_file, move_file, open_whole, try_lock, write_whole


def python(code: str, *words: object) -> subprocess.Popen[str]:
    """A process that runs `code` with `words` as its arguments."""
    code = f"import os, sys\nfrom pathlib import Path\nfrom chimera import files\n{code}"
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


HOLD = """
with files.lock_file(Path(sys.argv[1]), wait=True) as ours:
    print(ours, flush=True)
    sys.stdin.read()
"""


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.mark.parametrize("sync", get_args(Sync))
def test_a_kill_between_write_and_rename_leaves_the_old_file_whole(tmp_path: Path, sync: Sync) -> None:
    write_whole(tmp_path / "a", b"old")
    code = """
os.replace = lambda *_: os.kill(os.getpid(), 9)
files.write_whole(Path(sys.argv[1]), b"new", sys.argv[2])
"""
    process = python(code, tmp_path / "a", sync)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_bytes() == b"old"
    assert (tmp_path / ".a.tmp").exists()
    write_whole(tmp_path / "a", b"next", sync)
    assert (tmp_path / "a").read_bytes() == b"next"
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"old")
    (tmp_path / ".a.tmp").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_that_is_given_up_leaves_the_old_one_and_nothing_else(tmp_path: Path, error: Any) -> None:
    def give_up() -> None:
        with open_whole(tmp_path / "a") as file:
            file.write(b"half")
            raise error

    write_whole(tmp_path / "a", b"old")
    with pytest.raises(error):
        give_up()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_each_writer_may_have_a_temporary_name_of_its_own(tmp_path: Path) -> None:
    with open_whole(tmp_path / "a", temporary=tmp_path / "b") as file:
        file.write(b"new")
        assert os.listdir(tmp_path) == ["b"]
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int | str]:
    """What is done to the disk, in order: the inode of what is synced, or `rename`."""
    done: list[int | str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append(os.fstat(number).st_ino), sync(number)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("rename"), replace(*names)))
    return done


def test_what_a_power_cut_may_take_back_is_what_was_asked_for(tmp_path: Path, calls: list[int | str]) -> None:
    done = {}
    for sync in get_args(Sync):
        write_whole(tmp_path / "a", b"new", sync)
        inodes = {(tmp_path / "a").stat().st_ino: "bytes", tmp_path.stat().st_ino: "name"}
        done[sync] = [call if isinstance(call, str) else inodes[call] for call in calls]
        calls.clear()
    assert done == {"name": ["bytes", "rename", "name"], "bytes": ["bytes", "rename"], "nothing": ["rename"]}


def test_a_file_moved_on_its_disk_keeps_its_name_through_a_power_cut(tmp_path: Path, calls: list[int | str]) -> None:
    (tmp_path / "made").write_bytes(b"shard")
    (tmp_path / "to").mkdir()
    move_file(tmp_path / "made", tmp_path / "to" / "place")
    assert (tmp_path / "to" / "place").read_bytes() == b"shard"
    assert calls == ["rename", (tmp_path / "to").stat().st_ino]


def test_a_file_moved_to_another_disk_is_whole_and_durable_before_it_has_its_name(
    tmp_path: Path, calls: list[int | str]
) -> None:
    """As `work` on a node's own disk and the output on another: a copy lost with the power would be lost for good."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        file, place = Path(elsewhere, "made"), tmp_path / "place"
        assert os.stat(elsewhere).st_dev != tmp_path.stat().st_dev, "this test needs /dev/shm to be another file system"
        file.write_bytes(b"shard" * 1000)
        move_file(file, place)
        assert (place.read_bytes(), file.exists()) == (b"shard" * 1000, False)
        assert calls == ["rename", place.stat().st_ino, "rename", tmp_path.stat().st_ino]  # the first one fails
        assert os.listdir(tmp_path) == ["place"]


def test_a_lock_keeps_other_processes_out_and_ends_with_its_own(tmp_path: Path) -> None:
    holder = python(HOLD, tmp_path / "lock")
    assert line_of(holder) == "True"
    with lock_file(tmp_path / "lock", wait=False) as ours:
        assert not ours
    waiting = python(HOLD, tmp_path / "lock")
    kill(holder)
    assert line_of(waiting) == "True"
    with lock_file(tmp_path / "lock", wait=False) as ours:
        assert not ours
    kill(waiting)
    with lock_file(tmp_path / "lock", wait=False) as ours:
        assert ours


def test_two_processes_that_wait_are_never_inside_together(tmp_path: Path) -> None:
    code = """
folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(1000):
    with files.lock_file(folder / "lock", wait=True):
        os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
        (folder / "inside").unlink()
"""
    both = [python(code, tmp_path) for _ in range(2)]
    assert [line_of(process) for process in both] == ["ready", "ready"]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in both:
        process.communicate()
    assert [process.returncode for process in both] == [0, 0]


def test_a_folder_can_be_locked_too(tmp_path: Path) -> None:
    ours, other = os.open(tmp_path, os.O_RDONLY), os.open(tmp_path, os.O_RDONLY)
    assert try_lock(ours, tmp_path)
    assert not try_lock(other, tmp_path)
    os.close(ours)
    assert try_lock(other, tmp_path)
    os.close(other)


def test_a_lock_file_that_was_replaced_meanwhile_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder removed it when it was done, and another process has made, and holds, the one that is there now."""
    path, flock = tmp_path / "lock", fcntl.flock

    def removed_and_made_anew(file: Any, how: int) -> None:
        path.unlink()
        path.touch()
        flock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", removed_and_made_anew)
    with lock_file(path, wait=False) as held:
        assert not held
    monkeypatch.undo()
    with lock_file(path, wait=False) as held:
        assert held


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:  # what such a mount of NFS answers
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(OSError, match=r"the file system has no locks: .*/lock'"),
        lock_file(tmp_path / "lock", wait=True),
    ):
        pass
