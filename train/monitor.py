"""Callback: what the run really sees, against the plan.

Writes `SAVE_FOLDER/steps.jsonl` (one line a step: its `streams`, and `realised` and `planned` tokens of each stream
since the phase began), logs the same, and stops the run when a stream strays from its target, when the loss is not
finite, or when the data is not what the plan says.
"""

import json
import math
import os
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

from composer import Callback, Logger, State
from composer.loggers import LoggerDestination
from composer.utils import dist

from chimera.cli import UserError, say
from train.collate import StepInfo
from train.schedule import Plan


class Monitor(Callback):
    """Follows each step's streams, digest, loss and waiting time.

    Args:
        plan: the run's step plan.
        folder: local folder for `steps.jsonl`.
        config: the config's path, for the messages.
    """

    def __init__(self, plan: Plan, folder: Path, config: Path) -> None:
        self.plan = plan
        self.path = folder / "steps.jsonl"
        self.config = config
        self.file: Any = None
        self.realised: dict[str, int] = {}  # tokens of each stream since the phase began
        self.planned: dict[str, float] = {}  # its proportion of them
        self.phase = ""
        self.waited = 0.0  # seconds, of the step

    def fit_start(self, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value
        if dist.get_global_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            keep_steps(self.path, step)
            self.file = self.path.open("a", encoding="utf-8")
        self.started = time.perf_counter()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self.asked = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        # Runs before the curriculum's view: the callbacks are called in the order of main.py's list.
        info: StepInfo = state.batch["info"]
        self.waited = time.perf_counter() - self.asked
        if info.step != state.timestamp.batch.value:
            raise RuntimeError(f"the data is at step {info.step}, the trainer at {state.timestamp.batch.value}")
        self.info = info
        self._check_mix(info)

    def _check_mix(self, info: StepInfo) -> None:
        """Raise unless every stream is within one block per lane of its target since the phase's beginning."""
        segment = self.plan.segment(info.step)
        phase = self.plan.phases[segment.phase]
        if info.phase != self.phase:
            begun = self.plan.blocks_before(self.plan.phase_start(segment.phase))
            now = self.plan.blocks_before(info.step)
            self.phase = info.phase
            self.realised = {name: (now[name] - begun[name]) * self.plan.block_len for name in info.streams}
        for name, tokens in info.streams.items():
            self.realised[name] += tokens
        seen = sum(self.realised.values())
        targets = {name: phase.proportions.get(name, Fraction(0)) * seen for name in self.realised}
        for name, tokens in self.realised.items():
            if abs(tokens - targets[name]) >= self.plan.lanes * self.plan.block_len:
                raise RuntimeError(
                    f"step {info.step}: stream `{name}` has had {tokens} of the {seen} tokens of phase {info.phase}, "
                    f"{float(targets[name]):.0f} are due: the mixture is off by a block or more"
                )
        self.planned = {name: float(target) for name, target in targets.items()}

    def batch_end(self, state: State, logger: Logger) -> None:
        info, now = self.info, time.perf_counter()
        loss = float(state.total_loss_dict["loss/train/total"])
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {info.step} (phase {info.phase}, {info.seq_len} tokens a sequence, "
                f"batch {info.digest}): look at the batch with `python train/inspect_batch.py {self.config} "
                f"step={info.step} --decode`; no checkpoint of this step was saved"
            )
        logger.log_metrics(
            {f"mix/tokens/{name}": tokens for name, tokens in self.realised.items()}
            | {f"mix/planned_tokens/{name}": tokens for name, tokens in self.planned.items()}
            | {"data/wait_share": self.waited / max(1e-9, now - self.started), "loss/train/tokens": loss}
        )
        self.started = now
        if self.file is not None:
            line = {
                "step": info.step,
                "phase": info.phase,
                "seq_len": info.seq_len,
                "digest": info.digest,
                "loss": loss,
                "tokens": sum(info.streams.values()),
                "streams": info.streams,
                "realised": self.realised,
                "planned": self.planned,
            }
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Complete the step's metrics before it is saved: loggers come after the callback that saves, and may stop."""
        for destination in logger.destinations:
            if isinstance(destination, MetricsFile):
                destination.write(state.timestamp.batch.value - 1)

    def close(self, state: State, logger: Logger) -> None:
        if self.file is not None:
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None


def keep_steps(path: Path, steps: int) -> None:
    """Drop from a JSON-lines file what does not belong to the first `steps` steps, damaged lines included.

    Before step 0 nothing belongs: the file of a run without a checkpoint is kept as `.old`, unless a longer one is.
    """
    if not path.exists():
        return
    if steps == 0:
        set_aside(path, "holds no checkpoint to go on from")
        return
    kept: list[bytes] = []
    expected: int | None = None  # a branch's first line is of any step
    with path.open("rb") as lines:
        for line in lines:
            try:
                step = json.loads(line)["step"] if line.endswith(b"\n") else None
            except (ValueError, KeyError, TypeError):
                step = None
            if not isinstance(step, int):
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
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as out:
        out.writelines(kept)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)


def set_aside(path: Path, why: str) -> None:
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
