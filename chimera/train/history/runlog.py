"""What a save folder says about its run, as tables: the mix, the stages, passes over the data, and tokens so far."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from chimera.train.order.run_plan import densities
from chimera.train.order.schedule import Plan
from chimera.train.settings import TrainSettings

Floats = npt.NDArray[np.float64]
Points = tuple[npt.NDArray[np.int64], Floats]  # steps, values


@dataclass(frozen=True)
class MixRow:
    """One stream in one phase, over the steps done so far."""

    phase: str
    first_step: int
    end_step: int
    stream: str
    planned: float  # share of the positions
    realised: float | None  # None: no step of the phase is logged
    of_tokens: float | None  # its share of the tokens, padding being none
    worst: float | None  # blocks the stream was off its target at most, over all steps


@dataclass(frozen=True)
class StageRow:
    """One segment of the plan: a phase at one sequence length."""

    phase: str
    seq_len: int
    first_step: int
    end_step: int
    done: int  # steps logged
    tokens: int  # of them
    mean_loss: float | None  # over their trained tokens
    last_loss: float | None  # the same of the last tenth of its steps


@dataclass(frozen=True)
class Run:
    """A run as its save folder records it; arrays have one row a step logged.

    A branch logs from the step of the checkpoint it began with; what came before, its plan tells.
    """

    address: str  # of its save folder
    about: dict[str, Any]  # config.json
    settings: TrainSettings
    plan: Plan
    steps: npt.NDArray[np.int64]
    loss: Floats  # nan: the step had no token to train on
    trained: npt.NDArray[np.int64]  # tokens that the loss is over
    blocks: npt.NDArray[np.int64]  # [steps, streams of the plan]
    stream_tokens: npt.NDArray[np.int64]  # [steps, streams of the plan], without padding
    digests: list[str]
    starts: list[dict[str, Any]]
    evals: dict[tuple[str, int], Points]  # (stream, seq_len) → loss
    speed: Points  # tokens a second
    checkpoints: list[tuple[int, str, int]]  # step, name, bytes

    @property
    def done(self) -> int:
        """Steps done: one past the last one logged."""
        return int(self.steps[-1]) + 1 if len(self.steps) else 0

    @property
    def first(self) -> int:
        """The first step logged."""
        return int(self.steps[0]) if len(self.steps) else 0

    @cached_property
    def only_evaluated(self) -> list[str]:
        """Streams that were evaluated and that no phase trains on."""
        return sorted({stream for stream, _ in self.evals} - {*self.plan.streams})

    @property
    def evaluated(self) -> list[str]:
        """Streams that were evaluated."""
        evaluated = {stream for stream, _ in self.evals}
        return [stream for stream in (*self.plan.streams, *self.only_evaluated) if stream in evaluated]

    @cached_property
    def missing(self) -> list[int]:
        """Steps between the first and the last logged that have no line: it was damaged or lost."""
        return np.setdiff1d(np.arange(self.first, self.done), self.steps).tolist()

    @property
    def parent(self) -> Mapping[str, Any] | None:
        """Of a branch, the checkpoint it began with: `address`, `checkpoint`, `step`, `digest`, `run_name`."""
        return self.about.get("parent")

    @property
    def origin(self) -> str:
        """Where a branch left its parent, in words; empty for another run."""
        return f"{self.parent['run_name']} at step {self.parent['step']}" if self.parent else ""

    @property
    def since(self) -> str:
        """What is said of a count of steps logged: nothing, or where a branch's log begins."""
        return f" from step {self.first} on" if self.first else ""

    @property
    def tokens(self) -> int:
        """Tokens so far, without padding; of the steps before the first one logged as many as are due."""
        before = self._before(self.first) * self.plan.block_len * self._density()
        return int(self.stream_tokens.sum()) + round(float(before.sum()))

    @property
    def positions(self) -> int:
        """Places so far that held a token or padding."""
        return int(self._seen().sum()) * self.plan.block_len

    @property
    def untrained(self) -> int:
        """Steps logged that had no token to train on."""
        return int(np.isnan(self.loss).sum())

    def mean_loss(self, chosen: Any) -> float | None:
        """Mean loss over the trained tokens of the steps `chosen` (an index of arrays); None without any."""
        loss, weight = self.loss[chosen], self.trained[chosen]
        there = ~np.isnan(loss)
        return float(np.average(loss[there], weights=weight[there])) if weight[there].sum() else None

    def _density(self) -> Floats:
        """Of each stream of the plan, the share of its positions that hold a token, as the shards' manifest has it."""
        held = densities(self.about.get("tokens", {}), self.about.get("blocks", {}), self.plan.block_len)
        return np.array([float(held.get(name, 1)) for name in self.plan.streams])

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the digests of all steps logged, a line each."""
        return hashlib.sha256("".join(f"{digest}\n" for digest in self.digests).encode()).hexdigest()

    def phase_spans(self) -> list[tuple[int, int]]:
        """Of each phase: its first step and the one past its last."""
        starts = [self.plan.phase_start(phase) for phase in range(len(self.plan.phases))]
        return list(zip(starts, [*starts[1:], self.plan.steps], strict=True))

    def shares(self, phase: int) -> tuple[npt.NDArray[np.int64], Floats]:
        """The mix since the phase began, after each of its steps done: steps [n], shares [n, streams]."""
        here, seen = self._seen_in(phase)
        return self.steps[here], seen / seen.sum(axis=1, keepdims=True)

    def distances(self, phase: int) -> tuple[npt.NDArray[np.int64], Floats]:
        """Blocks each stream is away from its share since the phase began: steps [n], blocks [n, streams]."""
        here, seen = self._seen_in(phase)
        planned = np.array([float(self.plan.phases[phase].proportions.get(name, 0)) for name in self.plan.streams])
        return self.steps[here], seen - planned * seen.sum(axis=1, keepdims=True)

    def mix(self) -> list[MixRow]:
        rows = []
        for number, (phase, (first, end)) in enumerate(zip(self.plan.phases, self.phase_spans(), strict=True)):
            steps, shares = self.shares(number)
            _, away = self.distances(number)
            real = self.stream_tokens[self._within(first, end)].sum(axis=0)
            for index, stream in enumerate(self.plan.streams):
                planned = float(phase.proportions.get(stream, 0))
                realised, worst, of_tokens = None, None, None
                if len(steps):
                    realised, worst = float(shares[-1, index]), float(np.abs(away[:, index]).max())
                    of_tokens = float(real[index] / max(1, real.sum()))
                if planned or realised:
                    rows.append(MixRow(phase.name, first, end, stream, planned, realised, of_tokens, worst))
        return rows

    def stages(self) -> list[StageRow]:
        rows = []
        for segment in self.plan.segments:
            here = self._within(segment.first_step, segment.end_step)
            steps = np.flatnonzero(here)
            means = self.mean_loss(steps), self.mean_loss(steps[-max(1, len(steps) // 10) :])
            rows.append(
                StageRow(
                    segment.phase_name,
                    segment.seq_len,
                    segment.first_step,
                    segment.end_step,
                    len(steps),
                    int(self.stream_tokens[here].sum()),
                    *means,
                )
            )
        return rows

    def passes(self) -> list[tuple[str, int, float, float]]:
        """Of each stream: blocks stored, passes over them so far, and at the plan's end."""
        needed = self.plan.blocks_before(self.plan.steps)
        seen = self._seen()
        rows = []
        for index, stream in enumerate(self.plan.streams):
            if stored := self.about.get("blocks", {}).get(stream):
                rows.append((stream, stored, int(seen[index]) / stored, needed[stream] / stored))
        return rows

    def _seen(self) -> npt.NDArray[np.int64]:
        """Blocks of each stream so far, those before the first step logged included."""
        return self._before(self.first) + self.blocks.sum(axis=0)

    def _seen_in(self, phase: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Which steps logged are the phase's, and the blocks of each stream since it began, after each of them."""
        begin, end = self.phase_spans()[phase]
        here = self._within(begin, end)
        before = self._before(max(begin, min(self.first, end))) - self._before(begin)
        return here, before + np.cumsum(self.blocks[here], axis=0)

    def _before(self, step: int) -> npt.NDArray[np.int64]:
        return np.array(list(self.plan.blocks_before(step).values()), np.int64)

    def _within(self, first: int, end: int) -> npt.NDArray[np.bool_]:
        return (self.steps >= first) & (self.steps < end)
