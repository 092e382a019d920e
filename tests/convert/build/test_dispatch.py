"""Which part runs next, and what running one leaves behind."""

import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest

from chimera.cli import UserError
from chimera.convert.build import batches, dispatch, stream_bar
from chimera.convert.build import part as part_module
from chimera.convert.build.executor import Event, Task, seldom
from chimera.convert.build.part import Progress, run_part
from chimera.convert.build.plan import load_plan
from chimera.convert.settings import BuildSettings
from tests.convert import builds


class _Watched(builds.Inline):
    started: ClassVar[list[Task]] = []

    def __init__(self, work: Path) -> None:
        super().__init__(work, slots=6)

    def start(self, task: Any) -> None:
        self.started.append(task)
        super().start(task)


def test_every_stream_begins_before_parts_run_ahead_of_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds.write_sources(tmp_path / "in")
    settings = builds.config(tmp_path / "in", tmp_path / "out", part_bytes=4000)
    limited = settings["streams"]["limited"]
    settings["streams"] = {"a": limited, "b": limited, "whole": settings["streams"]["columns"]}
    monkeypatch.setattr(_Watched, "started", [])
    builds.build_here(settings, _Watched)
    begun = [(task.stream, task.part) for task in _Watched.started[:6]]
    assert begun == [("a", 0), ("b", 0), ("whole", 0), ("whole", 1), ("whole", 2), ("whole", 3)]
    ahead = [task.stream for task in _Watched.started if task.part in (1, 2) and task.stream != "whole"]
    assert ahead[:4] == ["a", "b", "a", "b"]  # none takes every slot


class _Bar:
    """A progress bar that remembers."""

    places: ClassVar[list[float]] = []

    def __init__(self, total: float, unit: str, label: str, initial: float) -> None:
        self.n = initial

    def update(self, step: float) -> None:
        self.n += step
        self.places.append(self.n)

    def close(self) -> None:
        pass


class _Backwards(builds.Inline):
    """Parts ahead end before the first one; `first` are the bar's places once the first one begins."""

    first: ClassVar[list[float]] = []

    def __init__(self, work: Path) -> None:
        super().__init__(work, slots=6, last_first=True)

    def wait(self, seconds: float) -> list[Any]:
        task = self._tasks.pop()
        if task.part == 0:
            self.first.extend(_Bar.places)
        moves: list[Any] = []
        run_part(self._work, task.stream, task.part, task.limit, moves.append)
        return [*(Event("progress", task, moved) for moved in moves), Event("done", task)]


def test_the_bar_of_a_limited_stream_leaves_out_what_ran_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds.write_sources(tmp_path / "in")
    settings = builds.config(tmp_path / "in", tmp_path / "out", part_bytes=4000)
    settings["streams"] = {"limited": settings["streams"]["limited"]}
    monkeypatch.setattr(_Bar, "places", [])
    monkeypatch.setattr(_Backwards, "first", [])
    monkeypatch.setattr(stream_bar, "progress", _Bar)
    builds.build_here(settings, _Backwards)
    assert len(_Backwards.first) > 10
    assert set(_Backwards.first) == {0}
    assert _Bar.places[-1] == 9000


class _Failing(builds.Inline):
    """Parts run last first, as if a worker each did; parts in `broken` have a source that fails."""

    broken: ClassVar[set[int]] = set()

    def __init__(self, work: Path) -> None:
        super().__init__(work, slots=6, last_first=True)

    def wait(self, seconds: float) -> list[Any]:
        if self._tasks[-1].part in self.broken:
            task = self._tasks.pop()
            return [Event("failed", task, UserError(f"part {task.part} cannot be read"))]
        return super().wait(seconds)


def test_a_part_ahead_of_a_limit_fails_a_build_only_if_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one worker such a part is never read, so with several it must not count either."""
    builds.write_sources(tmp_path / "in")

    def settings(out: str) -> dict[str, Any]:
        found = builds.config(tmp_path / "in", tmp_path / out, part_bytes=4000)
        return {**found, "streams": {"limited": found["streams"]["limited"]}}

    builds.build_here(settings("wanted"))
    monkeypatch.setattr(_Failing, "broken", {20, 21})
    builds.build_here(settings("out"), _Failing)
    assert builds.tree(tmp_path / "out") == builds.tree(tmp_path / "wanted")
    for part in (0, 1):
        monkeypatch.setattr(_Failing, "broken", {part})
        with pytest.raises(UserError, match=f"part {part} cannot be read"):
            builds.build_here(settings(f"other{part}"), _Failing)


@pytest.mark.parametrize(("stall_after", "longest"), [(8, 8), (1e12, dispatch.LONGEST_WAIT)])
def test_the_builder_sleeps_until_something_happens_or_a_part_counts_as_stalled(
    tmp_path: Path, stall_after: float, longest: float
) -> None:
    builds.write_sources(tmp_path / "in")
    asked: list[float] = []

    class Asked(builds.Inline):
        def wait(self, seconds: float) -> list[Any]:
            asked.append(seconds)
            return super().wait(seconds)

    builds.build_here(builds.config(tmp_path / "in", tmp_path / "out", stall_after=stall_after), Asked)
    assert len(asked) > 10
    assert longest - 7 < min(asked) <= max(asked) <= longest


def test_reports_are_summed_up_before_they_are_sent() -> None:
    sent: list[Progress] = []
    report = seldom(sent.append, every=1e6)
    for _ in range(1000):
        report(Progress(2.0, 3))
    assert sent == [Progress(2.0, 3)]  # that it moves at all shows at once
    report = seldom(sent.append, every=0)
    for _ in range(1000):
        report(Progress(2.0, 3))
    assert sum(moved.tokens for moved in sent[1:]) == 3000
    sent.clear()
    report = seldom(sent.append, every=1e-4)
    given = 0
    while len(sent) < 4:
        report(Progress(2.0, 3))
        given += 1
    assert sum(moved.tokens for moved in sent) == 3 * given


class _Gone(Exception):
    """The worker's death."""


class _Dying(builds.Inline):
    """Workers that die once they have committed, or else (`at_once`) at their first batch."""

    at_once = False
    deaths = 0

    def wait(self, seconds: float) -> list[Any]:
        task = self._tasks.pop(0)
        state = load_plan(self._work).streams[task.stream].part_folder(self._work, task.part) / "commits.jsonl"
        before = state.read_bytes() if state.exists() else b""

        def report(_: Any) -> None:
            if self.at_once or (state.exists() and state.read_bytes() != before):
                raise _Gone

        try:
            run_part(self._work, task.stream, task.part, task.limit, report)
        except _Gone:
            type(self).deaths += 1
            return [Event("lost", task, "its node is gone")]
        return [Event("done", task)]


def test_losses_count_until_the_part_moves_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds.write_sources(tmp_path / "in")

    def settings(out: str) -> dict[str, Any]:
        found = builds.config(tmp_path / "in", tmp_path / out, part_bytes=1 << 20)
        return {**found, "streams": {"columns": found["streams"]["columns"]}}

    builds.build_here(settings("wanted"))
    monkeypatch.setattr(batches, "BATCH_ROWS", 5)
    monkeypatch.setattr(_Dying, "deaths", 0)
    builds.build_here(settings("out"), _Dying)
    assert _Dying.deaths > dispatch.MAX_LOSSES
    assert builds.tree(tmp_path / "out") == builds.tree(tmp_path / "wanted")
    monkeypatch.setattr(_Dying, "at_once", True)
    with pytest.raises(UserError, match="is gone, 3 times without a step ahead: its node is gone: give it more memory"):
        builds.build_here(settings("other"), _Dying)


class _Store:
    def __init__(self) -> None:
        self.keys: list[str] = []

    def put(self, key: str, source: Path, check: Any) -> None:
        self.keys.append(key)


def test_no_upload_thread_outlives_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds.write_sources(tmp_path / "in")
    settings = builds.config(tmp_path / "in", tmp_path / "out", part_bytes=1 << 20)
    store = _Store()
    monkeypatch.setattr(part_module, "worker_store", lambda *_: store)
    work: list[Path] = []

    class Planned(builds.Inline):
        def wait(self, seconds: float) -> list[Any]:
            work.append(self._work)
            raise _Gone

    with pytest.raises(_Gone):
        builds.build_here({**settings, "streams": {"columns": settings["streams"]["columns"]}}, Planned)
    monkeypatch.setattr(BuildSettings, "remote", True)
    before = threading.active_count()

    def die(_: Any) -> None:
        raise _Gone

    with pytest.raises(_Gone):
        run_part(work[0], "columns", 0, None, die)
    assert threading.active_count() == before
    for _ in range(2):  # the second finds it done
        run_part(work[0], "columns", 0, None, lambda _: None)
        assert threading.active_count() == before
        assert len(store.keys) == len(set(store.keys)) > 3
