"""What must hold for the tokens of a stream's blocks, whoever wrote them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from chimera.mds import Array

_NOT_SAID, _SAID, _UNKNOWN, _AS_BEFORE = range(4)


@dataclass(frozen=True)
class ChatRules:
    """The ids that mark in a conversation what the assistant says (`chimera.convert.encode.documents.render`)."""

    start_id: int  # <|im_start|>
    end_id: int  # <|im_end|>
    header: tuple[int, ...]  # of `assistant` and the newline after it
    untrained: bool = False  # whether there are turns of the assistant that are not learned: their mask is False

    def broken(self, tokens: Array, masks: Array, outside: Array) -> Iterator[str]:
        """What is wrong with `masks`; `outside` is True where documents end and after them. All are of one shape.

        At the start of a block, and after the end of a document, what comes may be the rest of a longer one, whose
        message began elsewhere: the mask is over all of that message, over all after the rest of its header, or over
        none of it.
        """
        says, since = self._says(tokens, outside)
        said = (says == _SAID) & ~self.untrained
        wrong = said & ~masks | (says == _NOT_SAID) & masks
        yield from _first(wrong, "an assistant mask that is not what the assistant says")
        rest = (says == _UNKNOWN) | (says == _SAID) & self.untrained
        begins = np.where(says == _SAID, 0, len(self.header))
        late = rest[:, 1:] & masks[:, 1:] & ~masks[:, :-1] & (since[:, 1:] > begins[:, 1:])
        ends = rest[:, 1:] & ~masks[:, 1:] & masks[:, :-1] & (since[:, 1:] > 0)
        yield from _first(late | ends, "an assistant mask over a part of what the assistant says")

    def _says(self, tokens: Array, outside: Array) -> tuple[Array, Array]:
        """Whether the assistant says a token, and how many tokens before it that became so; [blocks, block_len]."""
        says = np.full(tokens.shape, _AS_BEFORE, np.int8)
        says[:, 0] = _UNKNOWN
        says[:, 1:][outside[:, :-1]] = _UNKNOWN
        says[:, 1:][tokens[:, :-1] == self.end_id] = _NOT_SAID
        starts = tokens == self.start_id
        says[starts | outside] = _NOT_SAID
        after = 1 + len(self.header)
        if after < tokens.shape[1]:
            begins = starts[:, :-after].copy()
            for place, id_ in enumerate(self.header, 1):
                begins &= tokens[:, place : place - after] == id_
            says[:, after:][begins] = _SAID
        places = np.arange(tokens.shape[1], dtype=np.int32)
        last = np.maximum.accumulate(np.where(says == _AS_BEFORE, 0, places), axis=1)
        return np.take_along_axis(says, last, axis=1), places - last


@dataclass(frozen=True)
class TemplateRules:
    """`ends` are the ids that may end an answer of a template's conversations.

    `whole`: each block begins with a conversation. `rests` as in `BlockRules`.
    """

    ends: frozenset[int]
    whole: bool
    rests: bool

    def broken(self, tokens: Array, masks: Array, outside: Array) -> Iterator[str]:
        """What is wrong with `masks`; the arguments are those of `ChatRules.broken`."""
        stops = masks[:, :-1] & ~masks[:, 1:]
        wrong = stops & ~np.isin(tokens[:, :-1], sorted(self.ends))
        yield from _first(wrong, "an assistant mask that does not end where an answer does")
        if self.whole or not self.rests:
            yield from _first(self._unlearned(masks, outside), "a conversation of which nothing is learned")

    def _unlearned(self, masks: Array, outside: Array) -> Array:
        """Ends of documents that begin in the same block, with no mask in between; [blocks, block_len - 1] bool."""
        seen = np.cumsum(masks, axis=1)
        places = np.arange(masks.shape[1], dtype=np.int32)
        before = np.maximum.accumulate(np.where(outside, places, -1), axis=1)[:, :-1]  # -1: none ended in this block
        seen_before = np.where(before < 0, 0, np.take_along_axis(seen, np.maximum(before, 0), axis=1))
        ended = outside[:, 1:] & ~outside[:, :-1] & ((before >= 0) | self.whole)
        return np.asarray(ended & (seen[:, 1:] == seen_before))


@dataclass(frozen=True)
class BlockRules:
    """`special` are the ids of all special tokens, `bos` those that a text begins with; `chat` is of conversations.

    `rests`: the end of a document may be followed by the rest of a longer one, as with `packing: best_fit`. `starts`:
    the masks say where documents start (`ShardFormat.starts`), as EOS stands inside of them too. `joined`: a document
    may go on in the next block, as with `packing: concat`.
    """

    vocab_size: int
    eos_id: int
    pad_id: int | None
    special: frozenset[int]
    chat: ChatRules | TemplateRules | None = None
    bos: tuple[int, ...] = ()
    rests: bool = False
    starts: bool = False
    joined: bool = False

    def padding(self, tokens: Array) -> Array:
        """Which of `tokens` [blocks, block_len] pad: PAD or, without such a token, each EOS after the last document."""
        if self.pad_id is not None:
            return np.asarray(tokens == self.pad_id)
        to_the_end = np.logical_and.accumulate((tokens == self.eos_id)[:, ::-1], axis=1)[:, ::-1]
        filled = np.zeros(tokens.shape, bool)
        filled[:, 1:] = to_the_end[:, 1:] & to_the_end[:, :-1]
        return filled

    def ends(self, tokens: Array, masks: Array | None) -> Array:
        """Where documents end: at each EOS, but one that goes on within its block. Of one shape, as in `broken`."""
        ends = np.asarray(tokens == self.eos_id)
        if self.starts and masks is not None:
            ends[:, :-1] &= masks[:, 1:] | ends[:, 1:] | self.padding(tokens)[:, 1:]
        return ends

    def broken(self, tokens: Array, masks: Array | None) -> Iterator[str]:
        """What is wrong with `tokens` [blocks, block_len] and `masks` [blocks, block_len] bool, each with one block."""
        padding, ends = self.padding(tokens), tokens == self.eos_id
        yield from _first(tokens >= self.vocab_size, f"an id outside of the vocabulary of {self.vocab_size}")
        yield from _first(padding[:, :1], "no token but padding")
        yield from _first(padding[:, :-1] & ~padding[:, 1:], "padding before a token")
        cut = padding[:, 1:] & ~padding[:, :-1] & ~ends[:, :-1]
        yield from _first(cut, "padding that does not follow the end of a document")
        if self.pad_id is None:
            yield from _first(ends[:, 1:] & ends[:, :-1] & ~padding[:, 1:], "padding before a token")
        if self.bos:
            yield from _first(self._no_bos(tokens, ends, padding), "a text that does not begin with BOS, and it alone")
        held = {self.eos_id, self.pad_id, *self.bos} - {None}
        held |= {self.chat.start_id, self.chat.end_id} if isinstance(self.chat, ChatRules) else set()
        yield from _first(np.isin(tokens, sorted(self.special - held)), "a special token that no document may hold")
        if self.chat and masks is not None:
            if self.starts:
                ends, whole = self.ends(tokens, masks), isinstance(self.chat, TemplateRules) and self.chat.whole
                ends[:, -1] &= whole  # else it may go on in another block
                if whole:
                    yield from _first(~masks[:, :1], "no conversation that starts where it does")
                masks = masks.copy()
                masks[:, 0] = False  # of one that goes on, the first may be learned
                masks[:, 1:] &= tokens[:, :-1] != self.eos_id
            yield from self.chat.broken(tokens, masks, padding | ends)

    def _no_bos(self, tokens: Array, ends: Array, padding: Array) -> Array:
        """Where behind the end of a document there is no BOS, or one elsewhere; [blocks, block_len - 1] bool."""
        begins, last = ends[:, :-1] & ~padding[:, 1:], tokens.shape[1] - 1
        wrong = (tokens[:, 1:] == self.bos[0]) & ~ends[:, :-1]
        for place, id_ in enumerate(self.bos if not self.rests else ()):
            wrong[:, : last - place] |= begins[:, : last - place] & (tokens[:, 1 + place :] != id_)
        return np.asarray(wrong)


def _first(bad: Array, what: str) -> Iterator[str]:
    """`what` with the first block of a [blocks, ...] table of faults, if there is any."""
    blocks = np.flatnonzero(bad.any(axis=1))
    if len(blocks):
        more = f" (and {len(blocks) - 1} more blocks)" if len(blocks) > 1 else ""
        yield f"block {blocks[0]} has {what}{more}"
