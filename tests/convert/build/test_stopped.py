"""Processes that are stopped (SIGSTOP) and go on: the same bytes, and nobody writes in their place meanwhile."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.convert import builds
from tests.convert.s3_server import S3Server


@pytest.fixture(scope="module")
def wanted(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("wanted")
    builds.build_here(builds.config(sources, folder / "out"))
    return builds.tree(folder / "out")


def wait_for(what: Any, process: "subprocess.Popen[str]") -> None:
    while not what():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def state_of(pid: int) -> str:
    """The letter that the kernel has for what a process does: T where it is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def worker_at(process: "subprocess.Popen[str]", output: Path) -> int:
    """A worker of a build, once one has committed; a spawned process and not multiprocessing's tracker."""
    wait_for(lambda: any((output / ".work").rglob("commits.jsonl")), process)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    raise AssertionError("no worker")


def test_a_builder_that_is_stopped_keeps_others_out_and_ends_in_the_same_bytes(
    sources: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    settings = builds.config(sources, tmp_path / "out")
    process = builds.start(settings, tmp_path)
    wait_for(lambda: any((tmp_path / "out" / ".work").rglob("commits.jsonl")), process)
    os.killpg(process.pid, signal.SIGSTOP)
    wait_for(lambda: state_of(process.pid) == "T", process)
    (tmp_path / "other").mkdir()
    for changes in ({}, {"rebuild": True}, {"work": str(tmp_path / "other" / "work")}):
        code, said = builds.run({**settings, **changes}, tmp_path / "other")
        assert (code, said.count("another builder is writing")) == (2, 1), said
    os.killpg(process.pid, signal.SIGCONT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert builds.tree(tmp_path / "out") == wanted


def test_a_worker_that_is_stopped_is_named_and_waited_for(
    sources: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    process = builds.start(builds.config(sources, tmp_path / "out", workers=1, stall_after=1), tmp_path)
    worker = worker_at(process, tmp_path / "out")
    os.kill(worker, signal.SIGSTOP)
    wait_for(lambda: state_of(worker) == "T", process)
    assert process.stdout
    said = next(line for line in process.stdout if "stalled: no row from part" in line)
    assert "; waiting" in said
    os.kill(worker, signal.SIGCONT)
    rest, _ = process.communicate(timeout=300)
    assert process.returncode == 0, rest
    assert builds.tree(tmp_path / "out") == wanted


def test_a_builder_whose_streams_were_taken_over_while_it_was_stopped_writes_nothing_more(
    sources: Path, tmp_path: Path, s3: S3Server
) -> None:
    """Two builds of one output on other terms: what is published stays, but for one upload that was on its way."""
    output, published = "s3://bucket/x", s3.root / "bucket" / "x"
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    settings = builds.config(sources, output, work=f"{ours}/work", workers=1)
    for name in ("lines", "limited"):
        settings["streams"].pop(name)
    process = builds.start(settings, ours)
    wait_for(lambda: len([*published.rglob("shard.*")]) > 3, process)
    os.killpg(process.pid, signal.SIGSTOP)
    wait_for(lambda: state_of(process.pid) == "T", process)
    code, said = builds.run({**settings, "work": f"{theirs}/work", "block_len": 32, "rebuild": True}, theirs)
    assert code == 0, said
    before = builds.tree(published)
    os.killpg(process.pid, signal.SIGCONT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 2, said
    assert "error: another builder began to write " in said
    changed = [key for key, value in builds.tree(published).items() if before.get(key) != value]
    assert before.keys() <= builds.tree(published).keys()
    assert len(changed) <= 1  # what was on its way when the builder was stopped, which no store takes back
