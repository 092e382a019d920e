"""Phases and curriculum stages → the step plan: what every step consumes, as arithmetic.

Phases × stages cut a run into segments of constant mixture, sequence length and batch size; everything else is
arithmetic on segments and on each phase's interleaving (see `interleaving.py`). With C lanes every lane draws the same
one for itself: a step takes blocks_per_step / C blocks in each, and its error bound holds per stream, phase and lane.
A phase starts its interleaving at 0; positions in a stream run on over phases.

Everything here is in integers and `Fraction`s; no array is longer than one period of one phase.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from math import gcd, isqrt, lcm

import numpy as np
import numpy.typing as npt

from chimera.cli import UserError
from chimera.train.order.interleaving import MAX_PERIOD, Interleaving

MAX_STEPS = 10**12  # numbers of blocks and sequences stay far within 64 bits


class ScheduleError(UserError):
    """Settings that no exact plan exists for; the message says which, and the nearest that work."""


@dataclass(frozen=True)
class Phase:
    """A span of steps with one mixture; `proportions` of the tokens, summing to 1."""

    name: str
    steps: int
    proportions: Mapping[str, Fraction]
    global_train_batch_size: int  # sequences a step (mode `tokens`: of the longest length)


@dataclass(frozen=True)
class Stage:
    """From `from_step` on, sequences of `seq_len` tokens."""

    from_step: int
    seq_len: int


@dataclass(frozen=True)
class Segment:
    """Steps [first_step, end_step) with one mixture, one sequence length and one batch size."""

    phase: int
    phase_name: str
    first_step: int
    end_step: int
    seq_len: int
    sequences_per_step: int
    blocks_per_step: int
    first_block: int  # blocks of the whole run before this segment
    first_sequence: int  # sequences of the whole run before this segment

    @property
    def steps(self) -> int:
        return self.end_step - self.first_step


@dataclass(frozen=True)
class Plan:
    """The step plan of a whole run; build it with `build_plan`."""

    phases: tuple[Phase, ...]
    segments: tuple[Segment, ...]
    streams: tuple[str, ...]  # in order of first appearance; a stream's number is its place here
    block_len: int
    lanes: int

    @cached_property
    def steps(self) -> int:
        return self.segments[-1].end_step

    @cached_property
    def blocks(self) -> int:
        last = self.segments[-1]
        return last.first_block + last.steps * last.blocks_per_step

    @property
    def positions(self) -> int:
        """Places of the whole run that hold a token or padding."""
        return self.blocks * self.block_len

    @cached_property
    def _first_steps(self) -> list[int]:
        return [segment.first_step for segment in self.segments]

    @cached_property
    def _phase_blocks(self) -> list[tuple[int, int]]:
        """Of each phase: the blocks of the run before it, and before the next."""
        firsts = [next(s for s in self.segments if s.phase == p).first_block for p in range(len(self.phases))]
        return list(zip(firsts, [*firsts[1:], self.blocks], strict=True))

    @cached_property
    def interleavings(self) -> tuple[Interleaving, ...]:
        """Of each phase: what its lanes draw. Numbers are those of `streams`."""
        interleavings = []
        for phase, (first, end) in zip(self.phases, self._phase_blocks, strict=True):
            # by name, so that the order of keys in a YAML file changes nothing
            shares = {self.streams.index(n): share for n, share in sorted(phase.proportions.items()) if share}
            interleavings.append(Interleaving(shares, (end - first) // self.lanes))
        return tuple(interleavings)

    @cached_property
    def _phase_starts(self) -> list[list[int]]:
        """[phase][stream]: blocks a lane has drawn from the stream before the phase."""
        starts, counts = [], [0] * len(self.streams)
        for interleaving, (first, end) in zip(self.interleavings, self._phase_blocks, strict=True):
            starts.append(list(counts))
            counts = [n + interleaving.count(s, (end - first) // self.lanes) for s, n in enumerate(counts)]
        return starts

    def segment(self, step: int) -> Segment:
        """The segment `step` lies in."""
        if not 0 <= step < self.steps:
            raise ScheduleError(f"step {step} is outside of the plan's steps 0 to {self.steps - 1}")
        return self.segments[bisect_right(self._first_steps, step) - 1]

    def phase_start(self, phase: int) -> int:
        """The first step of the `phase`-th phase."""
        return next(segment.first_step for segment in self.segments if segment.phase == phase)

    def check_ranks(self, ranks: int, from_step: int = 0) -> None:
        """Refuse a number of ranks that does not divide the sequences of every step from `from_step` on."""
        ahead = [segment for segment in self.segments if segment.end_step > from_step]
        bad = next((segment for segment in ahead if segment.sequences_per_step % ranks), None)
        if bad is not None:
            works = divisors(gcd(*(segment.sequences_per_step for segment in ahead)))
            raise ScheduleError(
                f"{bad.sequences_per_step} sequences a step in phase {bad.phase_name}, steps {bad.first_step} to "
                f"{bad.end_step - 1}, do not divide over {ranks} ranks; numbers of ranks that work for all steps "
                f"ahead: {', '.join(map(str, works))}"
            )

    def block_of(self, step: int) -> int:
        """Blocks of the run before `step` (0 ≤ step ≤ steps)."""
        if step == self.steps:
            return self.blocks
        segment = self.segment(step)
        return segment.first_block + (step - segment.first_step) * segment.blocks_per_step

    def step_of(self, block: int) -> int:
        """The step that consumes the run's `block`-th block; the inverse of `block_of`."""
        if not 0 <= block < self.blocks:
            raise ScheduleError(f"block {block} is outside of the plan's blocks 0 to {self.blocks - 1}")
        segment = self.segments[bisect_right([s.first_block for s in self.segments], block) - 1]
        return segment.first_step + (block - segment.first_block) // segment.blocks_per_step

    def sequences_before(self, step: int) -> int:
        """Sequences of the run before `step` (0 ≤ step ≤ steps)."""
        segment = self.segment(min(step, self.steps - 1))
        return segment.first_sequence + (step - segment.first_step) * segment.sequences_per_step

    def step_of_sequences(self, sequences: int) -> int:
        """The step before which exactly `sequences` were consumed; refuses a count inside a step."""
        firsts = [segment.first_sequence for segment in self.segments]
        segment = self.segments[max(bisect_right(firsts, sequences) - 1, 0)]
        steps, rest = divmod(sequences - segment.first_sequence, segment.sequences_per_step)
        step = segment.first_step + steps
        if rest or not 0 <= step <= segment.end_step:
            raise ScheduleError(f"{sequences} sequences do not end at a step of the plan")
        return step

    def lane_counts(self, step: int) -> list[int]:
        """[stream]: blocks a lane has drawn before `step`."""
        phase = self.segment(min(step, self.steps - 1)).phase
        drawn = (self.block_of(step) - self._phase_blocks[phase][0]) // self.lanes
        interleaving = self.interleavings[phase]
        return [n + interleaving.count(s, drawn) for s, n in enumerate(self._phase_starts[phase])]

    def blocks_before(self, step: int) -> dict[str, int]:
        """Blocks of each stream consumed before `step` (0 ≤ step ≤ steps), over all lanes."""
        return {name: n * self.lanes for name, n in zip(self.streams, self.lane_counts(step), strict=True)}

    def draws(self, first: int, end: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """What a lane draws in steps [first, end) of one phase, in order; the same in every lane.

        Returns the stream's number, and the position among the lane's blocks of that stream, each
        [(end − first) · blocks_per_step / lanes].
        """
        segment = self.segment(first)
        if end > first and self.segment(end - 1).phase != segment.phase:
            raise ValueError(f"steps {first} to {end - 1} lie in more than one phase")
        base = self._phase_blocks[segment.phase][0]
        interleaving = self.interleavings[segment.phase]
        n = np.arange((self.block_of(first) - base) // self.lanes, (self.block_of(end) - base) // self.lanes)
        periods, places = n // interleaving.period, n % interleaving.period
        streams = interleaving.stream_at[places]
        weights = np.array([interleaving.weights.get(s, 0) for s in range(len(self.streams))], np.int64)
        starts = np.array(self._phase_starts[segment.phase], np.int64)
        return streams, starts[streams] + periods * weights[streams] + interleaving.earlier[places]


def proportion(value: object, where: str = "") -> Fraction:
    """A share as the exact number that is written: 0.55, "1/3" or a `Fraction`.

    Raises `ScheduleError`, its message beginning with `where`, for anything else.
    """
    try:
        return value if isinstance(value, Fraction) else Fraction(str(value).strip())
    except (ValueError, ZeroDivisionError):
        raise ScheduleError(f"{where}{value!r} is not a proportion: write 0.55 or 1/3") from None


def build_plan(phases: Sequence[Phase], stages: Sequence[Stage], mode: str, block_len: int, lanes: int = 1) -> Plan:
    """Cut phases × stages into segments; raises `ScheduleError` where a step would not be exact.

    Mode `sequences`: every step of a phase has `global_train_batch_size` sequences, so tokens grow with the length.
    Mode `tokens`: every step has the tokens of `global_train_batch_size` sequences of the longest stage, so shorter
    stages have more sequences a step. A stage that begins after the last step is never reached.
    """
    _check(phases, stages, mode, block_len, lanes)
    longest = max(stage.seq_len for stage in stages)
    ends = np.cumsum([phase.steps for phase in phases]).tolist()
    cuts = sorted({0, *ends, *(s.from_step for s in stages if s.from_step < ends[-1])})
    segments: list[Segment] = []
    block = sequence = 0
    for first, end in pairwise(cuts):
        index = bisect_right(ends, first)
        phase = phases[index]
        seq_len = next(s.seq_len for s in reversed(stages) if s.from_step <= first)
        where = f"phase {phase.name}, steps {first} to {end - 1}"
        sequences = _check_batch(where, phase, seq_len, longest, mode, block_len, lanes)
        blocks = sequences * seq_len // block_len
        segments.append(Segment(index, phase.name, first, end, seq_len, sequences, blocks, block, sequence))
        block += (end - first) * blocks
        sequence += (end - first) * sequences
    names = dict.fromkeys(name for phase in phases for name, share in phase.proportions.items() if share)
    plan = Plan(tuple(phases), tuple(segments), tuple(names), block_len, lanes)
    for index, phase in enumerate(phases):
        period = lcm(*(share.denominator for share in phase.proportions.values()))
        if min(period, sum(s.steps * s.blocks_per_step for s in segments if s.phase == index) // lanes) > MAX_PERIOD:
            raise ScheduleError(
                f"phase {phase.name}: its proportions come out even only after {period} blocks; at most {MAX_PERIOD} "
                "are possible: write them with fewer decimals, or as fractions such as 1/3"
            )
    return plan


def _check(phases: Sequence[Phase], stages: Sequence[Stage], mode: str, block_len: int, lanes: int) -> None:
    """Refuse phases and stages that no plan can follow."""
    if mode not in ("sequences", "tokens"):
        raise ScheduleError(f"curriculum mode {mode!r}: one of sequences, tokens")
    if lanes < 1:
        raise ScheduleError(f"{lanes} lanes: at least 1 is needed")
    if not phases or not stages:
        raise ScheduleError("a plan needs at least one phase and one stage")
    names = [phase.name for phase in phases]
    if len(set(names)) < len(names) or not all(names):
        raise ScheduleError(f"phases are named {', '.join(map(repr, names))}: each needs a name of its own")
    if sum(phase.steps for phase in phases) > MAX_STEPS:
        raise ScheduleError(f"the phases have more than {MAX_STEPS:.0e} steps in all")
    for phase in phases:
        if phase.steps < 1 or phase.global_train_batch_size < 1:
            raise ScheduleError(
                f"phase {phase.name}: {phase.steps} steps of {phase.global_train_batch_size} sequences; "
                "both must be at least 1"
            )
        for name, share in phase.proportions.items():
            if share < 0:
                raise ScheduleError(f"phase {phase.name}: the proportion of {name} is negative ({share})")
        total = sum(phase.proportions.values(), Fraction(0))
        if total != 1:
            off = float(total - 1)
            raise ScheduleError(
                f"phase {phase.name}: the proportions sum to {float(total):.10g} ({off:+.3g}), not to 1: "
                + ", ".join(f"{name} {share}" for name, share in phase.proportions.items())
                + "; thirds are written as 1/3, and a stream of the file that an override leaves out stays: give it 0"
            )
    starts = [stage.from_step for stage in stages]
    if starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
        raise ScheduleError(f"curriculum stages begin at steps {starts}: the first must be 0 and each later")
    for stage in stages:
        if stage.seq_len < 2:
            raise ScheduleError(
                f"stage from step {stage.from_step}: sequences of {stage.seq_len} tokens train nothing: a token is "
                "predicted from those before it, so at least 2 are needed"
            )
        if block_len % stage.seq_len:
            fits = [n for n in divisors(block_len) if n > 1]
            place = bisect_right(fits, stage.seq_len)
            near = fits[max(0, place - 1) : place + 1]
            raise ScheduleError(
                f"stage from step {stage.from_step}: sequences of {stage.seq_len} tokens do not divide blocks of "
                f"{block_len}; the nearest that do: {' and '.join(map(str, near))}"
            )


def _check_batch(where: str, phase: Phase, seq_len: int, longest: int, mode: str, block_len: int, lanes: int) -> int:
    """The sequences a step of a segment; refuses those that are no whole number or fill no whole blocks."""
    size, length = phase.global_train_batch_size, seq_len if mode == "sequences" else longest
    unit = block_len * lanes // gcd(block_len * lanes, length)  # the least that fills whole blocks in every lane
    if size % unit:
        near = [n for n in (size // unit * unit, (size // unit + 1) * unit) if n]
        each = f" in each of {lanes} lanes" if lanes > 1 else ""
        raise ScheduleError(
            f"{where}: {size} sequences of {length} tokens do not fill whole blocks of {block_len}{each}; the nearest "
            f"global_train_batch_size: {' or '.join(map(str, near))}"
        )
    return size * length // seq_len


def divisors(n: int) -> list[int]:
    """All divisors of `n`, ascending."""
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
