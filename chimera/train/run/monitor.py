"""Callback: what the run really sees, against the plan.

Writes `SAVE_FOLDER/steps.jsonl`, one line a step:

    positions, padding, tokens   of the global batch: positions hold a token or padding
    trained, loss                tokens that a loss is computed for, and its mean over them; null without any
    streams, stream_tokens       positions and tokens of each stream
    realised, planned            positions of each stream since the phase began, and what is due of them
    parent                       of a branch's first step alone: the checkpoint it began with

It logs the same, and stops the run when a stream strays from its target, when the loss is not finite, or when the data
is not what the plan says.
"""

import json
import math
import os
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Logger, State
from composer.utils import dist

from chimera.cli import UserError, say
from chimera.text import counted
from chimera.train.order.schedule import Plan
from chimera.train.run.checkpoint_schema import Parent
from chimera.train.run.step_files import MetricsFile, keep_steps
from chimera.train.step.collate import StepInfo, real_tokens, trained_tokens


class Monitor(Callback):
    """Follows each step's streams, digest, loss and waiting time.

    Args:
        plan: the run's step plan.
        folder: local folder for `steps.jsonl`.
        config: the config's path, for the messages.
        pad_id: what is no token.
        parent: of a branch, which the first step it logs names.
    """

    def __init__(self, plan: Plan, folder: Path, config: Path, pad_id: int, parent: Parent | None = None) -> None:
        self.plan, self.pad_id, self.config, self.parent = plan, pad_id, config, parent
        self.path = folder / "steps.jsonl"
        self.file: Any = None
        self.realised: dict[str, int] = {}  # positions of each stream since the phase began
        self.planned: dict[str, float] = {}  # its proportion of them
        self.phase = ""
        self.waited = 0.0  # seconds, of the step
        self.untrained = 0  # steps of this start without a token to train on
        self.tokens: dict[str, int] = {}  # of the step on all ranks, by stream
        self.counted_phase = ""  # that `of_phase` is of
        self.trained = 0  # predictions of the step on all ranks
        self.counts = torch.zeros(0, dtype=torch.int64)  # this rank's tokens of the step, by stream
        # Since the step that the run's weights were first counted at (0: all they have seen), also across resumes:
        self.seen: dict[str, Any] = {"from_step": 0, "tokens": {}, "trained": 0, "untrained_steps": 0}
        self.of_phase: dict[str, int] = {}  # tokens of each stream, since the phase began or counting did

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "phase": self.phase, "of_phase": self.of_phase}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.of_phase = dict(state["seen"]), dict(state["of_phase"])
        self.counted_phase = state["phase"]

    def fit_start(self, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value
        if step and not self.seen["tokens"]:  # a checkpoint of before tokens were counted
            self.seen["from_step"] = step
        _drop_losses_of_nothing(logger, self)
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
        self.counts = real_tokens(state.batch, self.pad_id, len(self.plan.streams))

    def batch_start(self, state: State, logger: Logger) -> None:
        """Count the step's tokens and predictions on all ranks, now that `Curriculum` has viewed it."""
        counts = torch.cat([torch.tensor([trained_tokens(state.batch["labels"])]), self.counts])
        counts = state.device.tensor_to_device(counts)
        dist.all_reduce(counts, reduce_operation="SUM")
        self.trained, *tokens = counts.tolist()
        self.tokens = dict(zip(self.plan.streams, tokens, strict=True))
        for name, count in self.tokens.items():
            self.seen["tokens"][name] = self.seen["tokens"].get(name, 0) + count
            self.of_phase[name] = self.of_phase.get(name, 0) + count
        self.seen["trained"] += self.trained
        if not self.trained:
            self.seen["untrained_steps"] += 1
            if dist.get_global_rank() == 0 and not self.untrained:
                say(f"warning: step {self.info.step} has no token to train on: it has no loss and counts in no mean")
            self.untrained += 1

    def _check_mix(self, info: StepInfo) -> None:
        """Raise unless every stream is within one block per lane of its target since the phase's beginning."""
        segment = self.plan.segment(info.step)
        phase = self.plan.phases[segment.phase]
        if info.phase != self.phase:
            begun = self.plan.blocks_before(self.plan.phase_start(segment.phase))
            now = self.plan.blocks_before(info.step)
            if info.phase != self.counted_phase:
                self.of_phase = {}
            self.phase = self.counted_phase = info.phase
            self.realised = {name: (now[name] - begun[name]) * self.plan.block_len for name in info.streams}
        for name, positions in info.streams.items():
            self.realised[name] += positions
        seen = sum(self.realised.values())
        targets = {name: phase.proportions.get(name, Fraction(0)) * seen for name in self.realised}
        for name, positions in self.realised.items():
            if abs(positions - targets[name]) >= self.plan.lanes * self.plan.block_len:
                raise RuntimeError(
                    f"step {info.step}: stream `{name}` has had {positions} of the {seen} positions of phase "
                    f"{info.phase}, {float(targets[name]):.0f} are due: the mixture is off by a block or more"
                )
        self.planned = {name: float(target) for name, target in targets.items()}

    def batch_end(self, state: State, logger: Logger) -> None:
        info, now = self.info, time.perf_counter()
        loss = float(state.total_loss_dict["loss/train/total"]) if self.trained else None
        if loss is None:
            state.total_loss_dict = dict.fromkeys(state.total_loss_dict, math.nan)  # for who shows it
        elif not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {info.step} (phase {info.phase}, {info.seq_len} tokens a sequence, "
                f"batch {info.digest}): look at the batch with `python train/inspect_batch.py {self.config} "
                f"step={info.step} --decode`; no checkpoint of this step was saved"
            )
        share = sum(self.of_phase.values()) / sum(self.realised.values())  # of the positions that hold a token
        logger.log_metrics(
            {f"mix/positions/{name}": count for name, count in self.realised.items()}
            | {f"mix/planned_positions/{name}": count for name, count in self.planned.items()}
            | {f"mix/tokens/{name}": count for name, count in self.of_phase.items()}
            | {f"mix/planned_tokens/{name}": due * share for name, due in self.planned.items()}
            | {"data/wait_share": self.waited / max(1e-9, now - self.started)}
            | {"data/padding_share": 1 - sum(self.tokens.values()) / sum(info.streams.values())}
            | {"data/trained_tokens": self.trained}
            | ({} if loss is None else {"loss/train/tokens": loss})
        )
        self.started = now
        if self.file is not None:
            line = {
                "step": info.step,
                "phase": info.phase,
                "seq_len": info.seq_len,
                "digest": info.digest,
                "loss": loss,
                "trained": self.trained,
                "tokens": (tokens := sum(self.tokens.values())),
                "positions": (positions := sum(info.streams.values())),
                "padding": positions - tokens,
                "streams": info.streams,
                "stream_tokens": self.tokens,
                "realised": self.realised,
                "planned": self.planned,
            }
            if self.parent and info.step == self.parent.step:
                line["parent"] = self.parent.model_dump()
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Complete the step's metrics before it is saved: loggers come after the callback that saves, and may stop."""
        for destination in logger.destinations:
            if isinstance(destination, MetricsFile):
                destination.write(state.timestamp.batch.value - 1)

    def close(self, state: State, logger: Logger) -> None:
        if self.untrained and dist.get_global_rank() == 0:
            say(f"warning: {counted(self.untrained, 'step')} without a token to train on: such steps have no loss")
            self.untrained = 0
        if self.file is not None:
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None


def _drop_losses_of_nothing(logger: Logger, monitor: Monitor) -> None:
    """Have `logger` pass over the loss that Composer logs of a step without a trained token: 0, which it is not."""
    log = logger.log_metrics

    def log_metrics(metrics: dict[str, Any], step: int | None = None) -> None:
        if not monitor.trained:
            metrics = {name: value for name, value in metrics.items() if not name.startswith("loss/train/")}
        log(metrics, step)

    logger.log_metrics = log_metrics
