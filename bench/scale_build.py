"""What a build does with its parts, streams and files, beside converting them: for `scale.py`."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from chimera.convert.build.executor import Event, Executor, Task
from chimera.convert.build.part import Progress
from tests.convert import builds

Measured = Callable[[str], AbstractContextManager[dict[str, Any]]]
LINE = builds.jsonl([{"text": "The water of the river turns the wheel of the mill. " * 20}])
SLOTS = 64  # parts that run at a time


class Instant(Executor):
    """Ends each part at once, after it has moved `reports` times."""

    slots = SLOTS

    def __init__(self, reports: int = 10) -> None:
        self.reports, self.running = reports, list[Task]()

    def start(self, task: Task) -> None:
        self.running.append(task)

    def wait(self, seconds: float) -> list[Event]:
        tasks, self.running = self.running, []
        moved = [Event("progress", task, Progress(100.0, 25)) for task in tasks for _ in range(self.reports)]
        return [*moved, *(Event("done", task) for task in tasks)]

    def cancel(self, task: Task) -> None:
        self.running.remove(task)

    def close(self) -> None:
        self.running = []


def parts(count: int, folder: Path, measured: Measured) -> None:
    """A stream of one file, cut into many parts."""
    (folder / "lines.jsonl").write_bytes(LINE * count)
    build(folder, {"s": {"sources": [{"files": [f"{folder}/lines.jsonl"]}]}}, measured, part_bytes=len(LINE))


def streams(count: int, folder: Path, measured: Measured) -> None:
    """Many streams, each of one file."""
    found = {}
    for number in range(count):
        file = folder / f"{number:06d}.jsonl"
        file.write_bytes(LINE)
        found[f"s{number:06d}"] = {"sources": [{"files": [str(file)]}]}
    build(folder, found, measured)


def text_files(count: int, folder: Path, measured: Measured) -> None:
    files(count, folder, measured, ".txt")


def line_files(count: int, folder: Path, measured: Measured) -> None:
    files(count, folder, measured, ".jsonl")


def files(count: int, folder: Path, measured: Measured, suffix: str) -> None:
    """A stream of small files in folders of a thousand."""
    for number in range(count):
        file = folder / "texts" / f"{number // 1000:04d}" / f"{number % 1000:03d}{suffix}"
        if number % 1000 == 0:
            file.parent.mkdir(parents=True)
        file.write_bytes(LINE)
    build(
        folder, {"s": {"sources": [{"files": [f"{folder}/texts/**/*{suffix}"]}]}}, measured, part_bytes=16 * len(LINE)
    )


def build(folder: Path, streams: dict[str, Any], measured: Measured, **changes: Any) -> None:
    """A build from its config to its last part, none of which is read."""
    from chimera.convert.build.build import look
    from chimera.convert.build.dispatch import Dispatcher
    from chimera.convert.build.outputs import open_output
    from chimera.convert.build.plan import load_plan
    from chimera.convert.build.planner import make_plan
    from chimera.convert.encode.encoding import Encoder

    given = builds.config(folder, folder / "out", **{"part_bytes": 64 << 20, "streams": streams, **changes})
    with measured("config read"):
        settings = builds.merged(given)
    encoder = Encoder.from_settings(settings.tokenizer)
    work = settings.work_folder
    work.mkdir(parents=True)
    with measured("planned") as figures:
        plan = make_plan(settings, work, set(), encoder)
        plan.write(work)
        figures["parts"] = sum(len(stream.parts) for stream in plan.streams.values())
        figures["plan.json MB"] = megabytes(work / "plan.json")
    del plan
    with measured("plan read, by each worker"):
        plan = load_plan(work)
    with measured("parts looked at"):
        dispatcher = Dispatcher(plan.streams, work, 60)
    with measured("all parts dispatched") as figures, (executor := Instant()):
        accepted = dispatcher.run(executor)
        figures["accepted"] = sum(map(len, accepted.values()))
    with measured("the same command again, until it goes on"):
        look(settings, work, open_output(settings), encoder)


def megabytes(file: Path) -> float:
    return round(file.stat().st_size / 1e6, 2)
