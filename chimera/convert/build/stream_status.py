"""How far one stream of a build is, from the states of its parts or from the manifest."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from chimera.convert.build.part_state import PartState, fits
from chimera.convert.build.plan import StreamPlan
from chimera.manifest import Stream


@dataclass(frozen=True)
class Parts:
    total: int
    done: int
    running: int

    @property
    def waiting(self) -> int:
        return self.total - self.done - self.running


@dataclass(frozen=True)
class StreamStatus:
    """A stream's `state` is `finished`, `begun`, `waiting`, or `elsewhere`: another builder's.

    `at` and `total` are bytes of its sources, or with `max_tokens` tokens, as `unit` says; null of a finished
    stream. `rate` is of them a second, `left` seconds; null where nothing has moved yet or no builder is at work.
    """

    state: str
    shards: int = 0
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    filtered: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    parts: Parts | None = None
    unit: str | None = None
    at: float | None = None
    total: float | None = None
    rate: float | None = None
    left: float | None = None


def progress_of(
    plan: StreamPlan, states: Sequence[PartState], running: int, start: float | None, seconds: float | None
) -> StreamStatus:
    """How far a planned stream is, by the states of its parts; `seconds` since it was at `start`."""
    budget, sizes = plan.settings.max_tokens, [part.bytes for part in plan.parts]
    accepted, tokens = _accepted(states, budget)
    if budget is None:
        total: float = sum(sizes)
        done = sum(size if state.done else state.bytes for size, state in zip(sizes, states, strict=True))
        counts = states
    else:  # what ran ahead of the first part that is not done may turn out not to be wanted
        total, counts = budget, states[: accepted + 1]
        done = sum(state.splits["train"].tokens for state in counts)
    at = min(done, total)
    ended = accepted == len(states) or (budget is not None and tokens >= budget)
    moved = at - start if start is not None else 0.0
    rate = moved / seconds if seconds and moved > 0 else None
    parts = Parts(len(states), len(states) if ended else sum(state.done for state in states), 0 if ended else running)
    return StreamStatus(
        "begun" if ended or running or any(state.end for state in states) else "waiting",
        shards=sum(len(split.shards) for state in counts for split in state.splits.values()),
        rows=sum(state.read for state in counts),
        documents=sum(state.documents for state in counts),
        tokens=sum(split.tokens for state in counts for split in state.splits.values()),
        filtered=_sum(state.filtered for state in counts),
        rejected=_sum(state.rejected for state in counts),
        parts=parts,
        unit="bytes" if budget is None else "tokens",
        at=total if ended else at,
        total=total,
        rate=rate,
        left=0.0 if ended else (total - at) / rate if rate else None,
    )


def finished(stream: Stream) -> StreamStatus:
    """A stream as the manifest has it."""
    splits = stream.splits.values()
    return StreamStatus(
        "finished",
        shards=sum(split.shards for split in splits),
        rows=stream.rows.read,
        documents=stream.rows.documents,
        tokens=sum(split.tokens for split in splits),
        filtered=stream.rows.filtered,
        rejected=stream.rows.rejected,
    )


def _accepted(states: Sequence[PartState], budget: int | None) -> tuple[int, int]:
    """The parts in front that hold what the stream takes of them, and their tokens."""
    tokens = 0
    for index, state in enumerate(states):
        if not (state.done and fits(state, None if budget is None else max(0, budget - tokens))):
            return index, tokens
        tokens += state.splits["train"].tokens
    return len(states), tokens


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))
