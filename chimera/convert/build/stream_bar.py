"""The progress bar of a stream, which costs the same for each report however many parts there are."""

from chimera.cli import progress
from chimera.convert.build.part import Progress
from chimera.convert.build.part_state import PartState
from chimera.convert.build.plan import StreamPlan
from chimera.text import amount


class StreamBar:
    """A stream's progress: tokens where their number is limited, else bytes of the source.

    Of a limited stream's tokens those count that are certain to be wanted: of the accepted parts and the one after.
    """

    def __init__(self, plan: StreamPlan, states: list[PartState]) -> None:
        self._sizes = [part.bytes for part in plan.parts]
        self._budget = plan.settings.max_tokens
        self._accepted = 0
        self._tokens = [state.splits["train"].tokens for state in states]
        self._bytes = [self._read(part, state) for part, state in enumerate(states)]
        # kept up to date: a report must not cost as much as there are parts
        self._all_sizes, self._all_tokens, self._all_bytes = sum(self._sizes), sum(self._tokens), sum(self._bytes)
        self._certain = sum(self._tokens[:1])
        total, unit = (self._all_sizes, "B") if self._budget is None else (self._budget, "tok")
        self._bar = progress(total, unit, plan.name, initial=self.place())

    def at(self, part: int, state: PartState) -> None:
        """A part is where `state` says."""
        tokens, bytes_ = state.splits["train"].tokens, self._read(part, state)
        self._add(part, tokens - self._tokens[part], bytes_ - self._bytes[part])
        self._show()

    def moved(self, part: int, step: Progress) -> None:
        self._add(part, step.tokens, step.bytes)
        if self._budget is None:  # a hub file's bytes are known to be done at its end only: show that it moves
            self._bar.set_postfix_str(f"{amount(self._all_tokens)} tokens", refresh=False)
        self._show()

    def accept(self) -> None:
        """Count one more accepted part."""
        self._accepted += 1
        self._certain += sum(self._tokens[self._accepted : self._accepted + 1])
        self._show()

    def close(self) -> None:
        self._bar.close()

    def _read(self, part: int, state: PartState) -> float:
        """Bytes of a part; what rows did not account for (headers, other columns) counts at its end."""
        return self._sizes[part] if state.done else state.bytes

    def place(self) -> float:
        """How far the stream is, in the bar's unit."""
        if self._budget is None:
            return min(self._all_bytes, self._all_sizes)
        return min(self._certain, self._budget)

    def _add(self, part: int, tokens: int, bytes_: float) -> None:
        self._tokens[part] += tokens
        self._bytes[part] += bytes_
        self._all_tokens += tokens
        self._all_bytes += bytes_
        if part <= self._accepted:
            self._certain += tokens

    def _show(self) -> None:
        self._bar.update(self.place() - self._bar.n)
