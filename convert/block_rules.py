"""What must hold for the tokens of a stream's blocks, whoever wrote them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from convert.shards import Array


@dataclass(frozen=True)
class BlockRules:
    """`special` are the ids of all special tokens, `chat` those a conversation holds (none for text)."""

    vocab_size: int
    eos_id: int
    pad_id: int
    special: frozenset[int]
    chat: frozenset[int] = frozenset()
    end_id: int | None = None  # the token that closes what the assistant says

    def broken(self, tokens: Array, masks: Array | None) -> Iterator[str]:
        """What is wrong with `tokens` [blocks, block_len] and `masks` [blocks, block_len] bool, each with one block."""
        padding = tokens == self.pad_id
        yield from _first(tokens >= self.vocab_size, f"an id outside of the vocabulary of {self.vocab_size}")
        yield from _first(padding[:, :1], "no token but padding")
        yield from _first(padding[:, :-1] & ~padding[:, 1:], "padding before a token")
        cut = padding[:, 1:] & ~padding[:, :-1] & (tokens[:, :-1] != self.eos_id)
        yield from _first(cut, "padding that does not follow the end of a document")
        foreign = sorted(self.special - self.chat - {self.eos_id, self.pad_id})
        yield from _first(np.isin(tokens, foreign), "a special token that no document may hold")
        if masks is not None:
            yield from self._broken_masks(tokens, masks)

    def _broken_masks(self, tokens: Array, masks: Array) -> Iterator[str]:
        outside = (tokens == self.eos_id) | (tokens == self.pad_id)
        yield from _first(masks & outside, "an assistant mask over padding or the end of a document")
        closing = masks[:, :-1] & ~masks[:, 1:] & (tokens[:, :-1] != self.end_id)
        yield from _first(closing, "an assistant mask that ends before the assistant's closing token")


def _first(bad: Array, what: str) -> Iterator[str]:
    """`what` with the first block of a [blocks, ...] table of faults, if there is any."""
    blocks = np.flatnonzero(bad.any(axis=1))
    if len(blocks):
        more = f" (and {len(blocks) - 1} more blocks)" if len(blocks) > 1 else ""
        yield f"block {blocks[0]} has {what}{more}"
