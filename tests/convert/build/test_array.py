"""A build by several processes that run the same command on one work folder, some of them killed."""

import gzip
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from chimera.cli import UserError
from chimera.convert.build import array, dispatch
from chimera.convert.build.array import Helper, build_in_array
from chimera.convert.build.dispatch import START
from chimera.convert.build.executor import LocalExecutor
from chimera.convert.build.part import run_part
from chimera.convert.build.part_lock import lock_at
from chimera.convert.build.plan import load_plan
from chimera.convert.build.store import worker_store
from chimera.convert.build.work_lock import holder_of, lock_of
from chimera.files import lock_file
from chimera.objects import Objects
from tests.convert import builds
from tests.convert.s3_server import S3Server

Process = subprocess.Popen[str]


@pytest.fixture(scope="module", autouse=True)
def one_engine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHIMERA_ENCODER", "tokenizers")  # no comparison of engines
        yield


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of more parts than one process does at once."""
    folder = tmp_path_factory.mktemp("many")
    builds.write_sources(folder)
    rows = builds.jsonl({"text": text} for seed in range(10) for text in builds.texts(seed, 500))
    (folder / "many.jsonl").write_bytes(rows)
    return folder


@pytest.fixture(scope="module")
def wanted(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The output of one process."""
    folder = tmp_path_factory.mktemp("wanted")
    builds.build_here(settings_for(many, folder / "out", engine="local"))
    return builds.tree(folder / "out")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (array, dispatch):
        monkeypatch.setattr(module, "AGAIN", 0.01)


def settings_for(many: Path, output: Path | str, **changes: Any) -> dict[str, Any]:
    settings = builds.config(many, output, **{"engine": "array", "workers": 1, "part_bytes": 100_000, **changes})
    settings["streams"] |= {"many": {"sources": [{"files": [f"{many}/many.jsonl"]}]}}
    return settings


def wait_for(condition: Callable[[], Any], processes: list[Process]) -> Any:
    """What `condition` gives once it is true; fails where all processes have ended before."""
    while not (found := condition()):
        assert any(process.poll() is None for process in processes), [process.communicate()[0] for process in processes]
        time.sleep(0.01)
    return found


def test_the_builder_and_a_helper_are_killed_and_the_bytes_are_those_of_one(
    many: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    """Over an output of other settings, which the builder alone replaces."""
    settings = settings_for(many, tmp_path / "out", rebuild=True)
    builds.build_here({**settings_for(many, tmp_path / "out"), "block_len": 32})
    work = tmp_path / "out" / ".work"
    processes = {process.pid: process for process in (builds.start(settings, tmp_path) for _ in range(3))}

    def builder() -> Process | None:
        """The one that takes parts as the builder."""
        holder = holder_of(work)
        begun = holder and (work / START).exists() and list(work.glob("parts-*/many/*/commits.jsonl"))
        return processes.get(holder.pid) if holder and begun else None

    first = wait_for(builder, [*processes.values()])
    first.kill()
    del processes[first.pid]
    second = wait_for(builder, [*processes.values()])
    (helper,) = (process for process in processes.values() if process is not second)
    helper.kill()
    for process in (first, helper):
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0, said
    assert "going on with the unfinished build" in said
    assert builds.tree(tmp_path / "out") == wanted
    code, said = builds.run(settings, tmp_path)  # a task that comes late
    assert (code, "is finished: nothing to do" in said) == (0, True), said


class Interrupted(builds.Inline):
    """Stops once the build is planned."""

    def wait(self, seconds: float) -> list[Any]:
        raise KeyboardInterrupt


@contextmanager
def begun(settings: dict[str, Any]) -> Iterator[Path]:
    """The work folder of a build that has begun, held as by its builder."""
    with pytest.raises(KeyboardInterrupt):
        builds.build_here(settings, Interrupted)
    work = builds.merged(settings).work_folder
    with lock_of(work) as free:
        assert free
        yield work


def test_a_helper_takes_what_others_leave_but_no_part_of_a_limited_stream(
    many: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    settings = settings_for(many, tmp_path / "out")
    with begun(settings) as work:
        plan = load_plan(work)
        run_part(work, "many", 1, None, lambda _: None)
        helper = Helper(plan, work)
        held = ExitStack()
        held.enter_context(lock_file(lock_at(plan.streams["many"].part_folder(work, 0)), wait=False))

        class Released(builds.Inline):
            def wait(self, seconds: float) -> list[Any]:
                if len(helper._open) < 3:  # long after it came by
                    held.close()
                return super().wait(seconds)

        assert helper.run(Released(work, slots=2))
        taken = {path.parents[1].name for path in work.glob("parts-*/*/*/commits.jsonl")}
        assert taken == {"many", "columns", "lines", "chats"}
        others = sum(len(stream.parts) for name, stream in plan.streams.items() if name != "limited")
        assert helper.done == others - 1
        assert Helper(plan, work).run(builds.Inline(work))
    builds.build_here(settings)
    assert builds.tree(tmp_path / "out") == wanted


def test_a_helper_ends_without_a_builder_or_its_plan_and_does_nothing_for_another(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(many, tmp_path / "out")
    with begun(settings) as work:
        plan = load_plan(work)
        stale = Helper(plan, work)
        replace(plan, id="another").write(work)
        for stream in plan.streams:
            (work / "parts-another" / stream).mkdir(parents=True)
        with pytest.raises(FileNotFoundError):
            run_part(work, "many", 0, None, lambda _: None, plan.id)
        monkeypatch.setattr(array, "AGAIN", 1.0)  # before that it takes parts unawares
        with LocalExecutor(1, work) as executor:
            assert not stale.run(executor)
        assert (stale.done, list(work.rglob("commits.jsonl"))) == (0, [])
        plan.write(work)
    assert not Helper(plan, work).run(builds.Inline(work)), "nobody holds the work folder"


def test_a_helper_whose_part_cannot_be_read_says_so(many: Path, tmp_path: Path) -> None:
    packed = gzip.compress(builds.jsonl({"text": text} for text in builds.texts(5, 3000)), 0)
    (tmp_path / "rows.jsonl.gz").write_bytes(packed[:-8])
    settings = settings_for(many, tmp_path / "out", streams={"s": {"sources": [{"files": [f"{tmp_path}/*.gz"]}]}})
    with begun(settings) as work, LocalExecutor(1, work) as executor:
        with pytest.raises(UserError, match=r"rows\.jsonl\.gz cannot be read to its end"):
            Helper(load_plan(work), work).run(executor)


def test_a_builder_passes_over_parts_that_others_are_at_and_takes_what_they_have_done(
    many: Path, wanted: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(many, tmp_path / "out")
    held = ExitStack()
    started: list[tuple[str, int]] = []

    class Others(builds.Inline):
        """Another process holds a part, until the builder has nothing else to do, and does two more."""

        def start(self, task: Any) -> None:
            started.append((task.stream, task.part))
            super().start(task)

        def wait(self, seconds: float) -> list[Any]:
            folder = load_plan(self._work).streams["many"].part_folder(self._work, 0)
            if len(started) == 1:
                held.enter_context(lock_file(lock_at(folder), wait=False))
                for part in (3, 4):
                    run_part(self._work, "many", part, None, lambda _: None)
            found = super().wait(seconds)
            if ("chats", 0) in started and len(started) > 20:
                held.close()
            return found

    builds.build_here(settings, Others)
    assert builds.tree(tmp_path / "out") == wanted
    assert started.count(("many", 0)) > 1
    assert not {("many", 3), ("many", 4)} & {*started}
    assert capsys.readouterr().err.count("such parts are passed over meanwhile") == 1


def test_a_process_that_finds_a_finished_output_has_nothing_to_do(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = builds.config(many, tmp_path / "out", engine="array", workers=1)
    made = builds.build_here(settings)
    found = build_in_array(builds.merged(settings))
    assert found is not None
    assert found.model_dump() == made
    assert "is finished: nothing to do" in capsys.readouterr().err


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["folder", "store"])
def test_chaos_kills_of_processes_of_an_array(
    kind: str, many: Path, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, kills = random.Random(), 0
    with ExitStack() as stack:
        if kind == "store":
            worker_store.cache_clear()
            for key, value in stack.enter_context(S3Server(tmp_path / "s3", seaweed=True)).environment.items():
                monkeypatch.setenv(key, value)
        rounds = 8
        for number in range(rounds):
            output = str(tmp_path / f"out{number}") if kind == "folder" else f"s3://bucket/out{number}"
            settings = settings_for(many, output, work=str(tmp_path / f"work{number}"))
            running = [builds.start(settings, tmp_path) for _ in range(3)]
            for _ in range(6):
                time.sleep(rng.uniform(0, 5))
                at = rng.randrange(3)
                if running[at].poll() is None:
                    running[at].kill()
                    kills += 1
                running[at].communicate()
                running[at] = builds.start(settings, tmp_path)
            for process in running:
                said, _ = process.communicate(timeout=300)
                assert process.returncode == 0, said
            if kind == "folder":
                assert builds.tree(tmp_path / f"out{number}") == wanted
            else:
                store = Objects(output)
                assert {e.key: sha256(store.get(e.key)).hexdigest() for e in store.list()} == wanted
            assert not (tmp_path / f"work{number}").exists() or not list((tmp_path / f"work{number}").iterdir())
    print(f"\narray, {kind}: {kills} kills over {rounds} builds, each ended byte-identical to that of one process")
