"""Killed anywhere, run again: the same bytes, and no committed shard made twice."""

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chimera.commands import build_shards
from chimera.convert.build import batches, part_state, shard_writer
from chimera.convert.build import build as build_module
from chimera.convert.build.part import Progress, run_part
from chimera.convert.build.plan import load_plan
from tests.convert import builds


@pytest.fixture(scope="module")
def wanted(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The output of an undisturbed build."""
    folder = tmp_path_factory.mktemp("wanted")
    builds.build_here(builds.config(sources, folder / "out"))
    return builds.tree(folder / "out")


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_writes_the_same_bytes(
    sources: Path, wanted: dict[str, str], tmp_path: Path, workers: int
) -> None:
    code, said = builds.run(builds.config(sources, tmp_path / "out", workers=workers), tmp_path)
    assert code == 0, said
    assert builds.tree(tmp_path / "out") == wanted


def test_a_long_document_packed_in_slices_gives_the_same_bytes(
    sources: Path, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "SLICE", 130)  # two blocks
    builds.build_here(builds.config(sources, tmp_path / "out"))
    assert builds.tree(tmp_path / "out") == wanted


class _Killed(BaseException):
    """Stands for a kill: nothing in the builder catches it."""


def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCH_ROWS", 5)


def _plan(settings: dict[str, Any]) -> Path:
    """The work folder of a build that is planned and no further."""

    class Stop(builds.Inline):
        def wait(self, seconds: float) -> list[Any]:
            raise _Killed

    with pytest.raises(_Killed):
        builds.build_here(settings, Stop)
    return Path(settings["output"]) / ".work"


@pytest.mark.parametrize("stream", ["columns", "lines", "limited", "chats"])
def test_a_part_stopped_at_any_batch_goes_on_behind_its_last_shard(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    _small_batches(monkeypatch)
    settings = builds.config(sources, tmp_path / "out", part_bytes=1 << 20)
    work = _plan(settings)
    limit = settings["streams"][stream].get("max_tokens")
    moves: list[Progress] = []
    run_part(work, stream, 0, limit, moves.append)
    folder = load_plan(work).streams[stream].part_folder(work, 0)
    complete = _shards(folder)
    assert len(complete) > 3
    for stop in range(1, len(moves), 3):
        os.rename(folder, work / f"{stream}-{stop}")
        seen = 0

        def report(_: Progress, stop: int = stop) -> None:
            nonlocal seen
            seen += 1
            if seen == stop:
                raise _Killed

        with pytest.raises(_Killed):
            run_part(work, stream, 0, limit, report)
        (folder / "train" / "shard.00000.00099.mds.zstd").write_bytes(b"torn")
        (folder / "train" / ".shard.tmp").write_bytes(b"torn")
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("shard.*") if path.stat().st_size > 4}
        again: list[Progress] = []
        run_part(work, stream, 0, limit, again.append)
        assert _shards(folder) == complete
        assert {path: path.stat().st_mtime_ns for path in before} == before  # none was written again
        redone = sum(move.tokens for move in moves[:stop]) + sum(m.tokens for m in again) - sum(m.tokens for m in moves)
        assert redone <= 2 * 6000  # at most a shard, and the batch that filled it


@pytest.mark.parametrize("packing", ["concat", "best_fit", "none"])
def test_a_kill_costs_one_shard_however_many_a_document_fills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    monkeypatch.setattr(shard_writer, "SLICE", 128)
    rng = random.Random(6)
    rows = [{"instruction": "?", "input": "", "output": builds.text(rng, words)} for words in (30, 4000, 9, 3000, 700)]
    (tmp_path / "long.jsonl").write_bytes(builds.jsonl(rows))
    stream = {"format": "chatml", "packing": packing, "sources": [{"files": [f"{tmp_path}/long.jsonl"]}]}
    settings = builds.config(tmp_path, tmp_path / "out", shard_bytes=1500, streams={"long": stream})
    work = _plan({**settings, "part_bytes": 1 << 20})
    made: list[Path] = []
    save, write_shard = part_state.save, shard_writer.write_shard

    def counted(*arguments: Any) -> Any:
        made.append(arguments[1] / arguments[2])
        return write_shard(*arguments)

    monkeypatch.setattr(shard_writer, "write_shard", counted)
    run_part(work, "long", 0, None, lambda _: None)
    folder = load_plan(work).streams["long"].part_folder(work, 0)
    complete, shards = _shards(folder), list(made)
    assert len(shards) > 15
    for stop in range(0, len(shards), 3):
        for committed in (False, True):
            os.rename(folder, work / f"long-{stop}-{committed}")
            made.clear()
            seen = 0

            def killed(*arguments: Any, stop: int = stop, committed: bool = committed) -> None:
                nonlocal seen
                seen += 1
                if committed or seen <= stop:
                    save(*arguments)
                if seen > stop:
                    raise _Killed

            with monkeypatch.context() as patch:
                patch.setattr(part_state, "save", killed)
                with pytest.raises(_Killed):
                    run_part(work, "long", 0, None, lambda _: None)
            run_part(work, "long", 0, None, lambda _: None)
            assert _shards(folder) == complete
            assert sorted(made) == sorted(shards if committed else [*shards, shards[stop]])


def _shards(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in builds.tree(folder).items() if "shard." in name or name == "rejects.jsonl"}


def kill_until_done(
    settings: dict[str, Any], folder: Path, rng: random.Random, most: int, start: float = 2.0, **environment: str
) -> int:
    """Kill the builder (its workers die with it) again and again, then let it end; how often it was killed.

    A kill comes within `start` seconds, whatever the builder is at, or within a moment of some shard it makes.
    """
    places = [Path(place) for place in (settings["output"], settings.get("work")) if place and "://" not in place]

    def shards() -> int:
        names = (name for place in places for _, _, names in os.walk(place) for name in names)
        return sum(name.startswith("shard.") for name in names)

    for kills in range(most):
        wanted = shards() + rng.randrange(1, 20) if rng.random() < 0.7 else 0
        process = builds.start(settings, folder, **environment)
        while wanted and process.poll() is None and shards() < wanted:
            time.sleep(0.002)
        try:
            said, _ = process.communicate(timeout=rng.uniform(0, 0.1) if wanted else rng.uniform(0, start))
            assert process.returncode == 0, said
            return kills
        except builds.subprocess.TimeoutExpired:
            process.kill()
            process.communicate(timeout=60)  # the pipe closes when the last worker is gone
    code, said = builds.run(settings, folder, **environment)
    assert code == 0, said
    return most


def test_killed_builds_end_in_the_same_bytes(sources: Path, wanted: dict[str, str], tmp_path: Path) -> None:
    settings = builds.config(sources, tmp_path / "out")
    assert kill_until_done(settings, tmp_path, random.Random(5), most=3) > 0
    assert builds.tree(tmp_path / "out") == wanted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_build_says_so_and_goes_on(
    sources: Path, wanted: dict[str, str], tmp_path: Path, number: int
) -> None:
    settings = builds.config(sources, tmp_path / "out")
    process = builds.start(settings, tmp_path)
    _wait_for(lambda: any((tmp_path / "out" / ".work").glob("parts-*/*/*/commits.jsonl")), process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.count("stopped; the same command goes on from here\n") == said.count("stopped") == 1
    assert "Traceback" not in said
    code, said = builds.run(settings, tmp_path)
    assert code == 0, said
    assert "going on with the unfinished build" in said
    assert builds.tree(tmp_path / "out") == wanted


def test_a_stop_in_the_midst_of_a_clean_up_is_not_passed_over(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows() -> Iterator[int]:
        try:
            yield 0
        finally:  # where the collector of garbage ends it
            raise KeyboardInterrupt

    def build(*_: Any) -> None:
        next(rows())
        threading.Event().wait(20)

    config = tmp_path / "shards.yaml"
    config.write_text(json.dumps(builds.config(sources, tmp_path / "out")))
    monkeypatch.setattr(build_module, "build", build)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            build_shards.main([str(config)])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_killed_worker_is_reported_and_replaced(sources: Path, wanted: dict[str, str], tmp_path: Path) -> None:
    process = builds.start(builds.config(sources, tmp_path / "out", workers=1), tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    killed: list[int] = []

    def kill_a_worker() -> bool:
        for child in children.read_text().split():
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(int(child), signal.SIGKILL)
                killed.append(int(child))
        return bool(killed)

    _wait_for(kill_a_worker, process)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "it was killed (SIGKILL), which the system does when memory runs out; another goes on" in said
    assert builds.tree(tmp_path / "out") == wanted


def _wait_for(condition: Callable[[], bool], process: Any) -> None:
    """Until `condition` holds; fails when the process ends first."""
    while not condition():
        with contextlib.suppress(builds.subprocess.TimeoutExpired):
            process.wait(0.002)
            raise AssertionError(process.communicate()[0])


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_chaos_kills_of_local_builds(sources: Path, wanted: dict[str, str], tmp_path: Path) -> None:
    rng = random.Random()
    kills = rounds = 0
    while kills < 60:
        folder = tmp_path / f"round{rounds}"
        folder.mkdir()
        settings = builds.config(sources, folder / "out", workers=rng.choice([1, 2, 3]))
        kills += kill_until_done(settings, folder, rng, most=8)
        assert builds.tree(folder / "out") == wanted
        rounds += 1
    print(f"\nlocal: {kills} kills over {rounds} builds, each ended byte-identical")
