"""What must hold for the tokens of a stream's blocks, whoever wrote them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from convert.shards import Array

_NOT_SAID, _SAID, _UNKNOWN, _AS_BEFORE = range(4)


@dataclass(frozen=True)
class ChatRules:
    """The ids that mark in a conversation what the assistant says (`convert.documents.render`)."""

    start_id: int  # <|im_start|>
    end_id: int  # <|im_end|>
    header: tuple[int, ...]  # of `assistant` and the newline behind it

    def broken(self, tokens: Array, masks: Array, outside: Array) -> Iterator[str]:
        """What is wrong with `masks`; `outside` is True where documents end and behind them. All are of one shape.

        At the start of a block, and behind the end of a document, what comes may be the rest of a longer one, whose
        message began elsewhere: the mask is over all of that message, over all behind the rest of its header, or over
        none of it.
        """
        says, since = self._says(tokens, outside)
        wrong = (says == _SAID) & ~masks | (says == _NOT_SAID) & masks
        yield from _first(wrong, "an assistant mask that is not what the assistant says")
        rest = says == _UNKNOWN
        late = rest[:, 1:] & masks[:, 1:] & ~masks[:, :-1] & (since[:, 1:] > len(self.header))
        ends = rest[:, 1:] & ~masks[:, 1:] & masks[:, :-1] & (since[:, 1:] > 0)
        yield from _first(late | ends, "an assistant mask over a part of what the assistant says")

    def _says(self, tokens: Array, outside: Array) -> tuple[Array, Array]:
        """Whether the assistant says a token, and how many tokens before it that became so; [blocks, block_len]."""
        marks = np.full(tokens.shape, _AS_BEFORE, np.int8)
        marks[:, 0] = _UNKNOWN
        marks[:, 1:][outside[:, :-1]] = _UNKNOWN
        marks[:, 1:][tokens[:, :-1] == self.end_id] = _NOT_SAID
        starts = tokens == self.start_id
        marks[starts | outside] = _NOT_SAID
        behind = 1 + len(self.header)
        if behind < tokens.shape[1]:
            said = starts[:, :-behind].copy()
            for place, id_ in enumerate(self.header, 1):
                said &= tokens[:, place : place - behind] == id_
            marks[:, behind:][said] = _SAID
        places = np.arange(tokens.shape[1], dtype=np.int32)
        last = np.maximum.accumulate(np.where(marks == _AS_BEFORE, 0, places), axis=1)
        return np.take_along_axis(marks, last, axis=1), places - last


@dataclass(frozen=True)
class BlockRules:
    """`special` are the ids of all special tokens; `chat` is of conversations."""

    vocab_size: int
    eos_id: int
    pad_id: int
    special: frozenset[int]
    chat: ChatRules | None = None

    def broken(self, tokens: Array, masks: Array | None) -> Iterator[str]:
        """What is wrong with `tokens` [blocks, block_len] and `masks` [blocks, block_len] bool, each with one block."""
        padding = tokens == self.pad_id
        yield from _first(tokens >= self.vocab_size, f"an id outside of the vocabulary of {self.vocab_size}")
        yield from _first(padding[:, :1], "no token but padding")
        yield from _first(padding[:, :-1] & ~padding[:, 1:], "padding before a token")
        cut = padding[:, 1:] & ~padding[:, :-1] & (tokens[:, :-1] != self.eos_id)
        yield from _first(cut, "padding that does not follow the end of a document")
        held = {self.eos_id, self.pad_id} | ({self.chat.start_id, self.chat.end_id} if self.chat else set())
        yield from _first(np.isin(tokens, sorted(self.special - held)), "a special token that no document may hold")
        if self.chat and masks is not None:
            yield from self.chat.broken(tokens, masks, padding | (tokens == self.eos_id))


def _first(bad: Array, what: str) -> Iterator[str]:
    """`what` with the first block of a [blocks, ...] table of faults, if there is any."""
    blocks = np.flatnonzero(bad.any(axis=1))
    if len(blocks):
        more = f" (and {len(blocks) - 1} more blocks)" if len(blocks) > 1 else ""
        yield f"block {blocks[0]} has {what}{more}"
