"""The run's files that hold a line for each step: `metrics.jsonl` written, and any of them cut to its checkpoint."""

import json
import math
from pathlib import Path
from typing import Any

from composer import Logger, State
from composer.loggers import LoggerDestination
from composer.utils import dist

from chimera.cli import say
from chimera.files import open_whole


def keep_steps(path: Path, steps: int) -> None:
    """Drop from a JSON-lines file what does not belong to the first `steps` steps, damaged lines included.

    Before step 0 nothing belongs: the file of a run without a checkpoint is kept as `.old`, unless a longer one is.
    """
    if not path.exists():
        return
    if steps == 0:
        archive(path, "holds no checkpoint to go on from")
        return
    kept: list[bytes] = []
    expected: int | None = None  # a branch's first line is of any step
    with path.open("rb") as lines:
        for line in lines:
            try:
                step = json.loads(line)["step"] if line.endswith(b"\n") else None
            except (ValueError, KeyError, TypeError, RecursionError):
                step = None
            if type(step) is not int:
                continue
            if step >= steps:
                break
            if expected is not None and step != expected:
                say(f"warning: {path} goes from step {expected - 1} to {step}")
            kept.append(line)
            expected = step + 1
    if expected != steps:
        ends = "is empty" if expected is None else f"ends at step {expected - 1}"
        say(f"warning: {path} {ends}, the checkpoint at {steps - 1}")
    with open_whole(path, sync="bytes") as out:
        out.writelines(kept)


def archive(path: Path, why: str) -> None:
    """Move a file with another run's steps to `.old`, or remove it if it is empty or a longer `.old` is there.

    `why` completes the message, which begins with the folder's name.
    """
    if not path.exists():
        return
    old, size = path.with_name(f"{path.name}.old"), path.stat().st_size
    if size and (not old.exists() or old.stat().st_size <= size):
        path.replace(old)
        say(f"{path.parent} {why}: the {path.name} of before is kept as {old.name}")
    else:
        path.unlink()


class MetricsFile(LoggerDestination):
    """Every metric the run logs, one JSON line a step in `SAVE_FOLDER/metrics.jsonl` (rank 0)."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self.file: Any = None
        self.pending: dict[str, Any] = {}  # logged, not written
        self.line: dict[str, Any] = {}  # the file's last, which begins at byte `begin`
        self.begin = 0
        self.step = -1
        self.trained = False  # to the end

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.step = state.timestamp.batch.value - 1
            keep_steps(self.path, self.step + 1)
            self.file = self.path.open("ab")

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        for name, value in metrics.items():
            number = value.item() if hasattr(value, "item") else value
            if isinstance(number, int | float) and math.isfinite(number):
                self.pending[name] = number

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self.write(state.timestamp.batch.value - 1)

    def fit_end(self, state: State, logger: Logger) -> None:
        self.trained = True

    def write(self, step: int) -> None:
        """Write what is pending as the line of `step`; where that is written already, into it."""
        if self.file is not None and (self.pending or step > self.step):
            if step > self.step:
                self.step, self.line, self.begin = step, {"step": step}, self.file.tell()
            self.line |= self.pending
            self.file.seek(self.begin)
            self.file.truncate()
            self.file.write(json.dumps(self.line).encode() + b"\n")
            self.file.flush()
        self.pending = {}

    def close(self, state: State, logger: Logger) -> None:
        if self.file is not None:
            if self.trained:  # evaluations at the end come after it
                self.write(self.step)
            self.file.close()
            self.file = None
