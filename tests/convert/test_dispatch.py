"""Which part runs next."""

from pathlib import Path
from typing import Any, ClassVar

import pytest

from convert.engine import Task
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
    monkeypatch.setattr(builds, "Inline", _Watched)
    builds.build_here(settings)
    begun = [(task.stream, task.part) for task in _Watched.started[:6]]
    assert begun == [("a", 0), ("b", 0), ("whole", 0), ("whole", 1), ("whole", 2), ("whole", 3)]
    ahead = [task.stream for task in _Watched.started if task.part in (1, 2) and task.stream != "whole"]
    assert ahead[:4] == ["a", "b", "a", "b"]  # none takes every slot
