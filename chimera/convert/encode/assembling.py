"""The ids of texts, and special tokens → the ids of documents, for all documents of a batch at once."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from chimera.convert.encode.document import Document
from chimera.convert.encode.engines import Flat
from chimera.mds import Array


class Encoded(NamedTuple):
    """Documents as ids, one after another.

    `ids` [tokens] have EOS at the end of each document; `ends` [documents + 1] say where each begins and the last ends.
    Of conversations `mask` [tokens] bool is what is learned (and the first token of one that `starts`), and `answers`
    say for each how many of its ids there are up to the end of each of its answers.
    """

    ids: Array
    ends: Array
    mask: Array | None = None
    answers: Sequence[list[int]] = ()

    def documents(self) -> Iterator[tuple[Array, Array | None, list[int]]]:
        """The ids, mask and answers of each document."""
        for index, (begin, end) in enumerate(pairwise(self.ends.tolist())):
            mask = self.mask[begin:end] if self.mask is not None else None
            yield self.ids[begin:end], mask, self.answers[index] if self.answers else []


def assembled(documents: Sequence[Document], found: Flat, bos: Sequence[int], eos: int) -> Encoded:
    """The documents, either all texts or all conversations, from the ids of the texts in them (`found`).

    A text begins with `bos`; a conversation does not.
    """
    ids, ends = found
    masked = any(document.assistant for document in documents)
    counts = np.cumsum([0, *(len(document.pieces) for document in documents)])
    if masked or counts[-1] + 1 != len(ends):
        return _of_pieces(documents, ids, ends, () if masked else bos, eos)
    ends = ends[counts]  # a long text is of several pieces
    added = [*bos, eos]
    places = np.repeat(ends[:-1, np.newaxis], len(added), axis=1)
    places[:, -1] = ends[1:]
    ids = np.insert(ids, places.ravel(), np.tile(np.array(added, ids.dtype), len(documents)))
    return Encoded(ids, ends + len(added) * np.arange(len(ends)))


def _of_pieces(documents: Sequence[Document], ids: Array, text_ends: Array, bos: Sequence[int], eos: int) -> Encoded:
    """The same where special tokens stand between the texts."""
    special: list[int] = []  # in order, BOS and EOS among them
    before: list[int] = []  # texts before each of them
    passed = [(0, 0)]  # texts and special tokens up to each piece's end
    last = [0]  # pieces up to each document's end
    texts = 0
    for document in documents:
        for piece in (*bos, *document.pieces, eos):
            if isinstance(piece, bytes):
                texts += 1
            else:
                special.append(piece)
                before.append(texts)
            passed.append((texts, len(special)))
        last.append(len(passed) - 1)
    up_to, specials = np.array(passed).T
    ends = text_ends[up_to] + specials  # of each piece
    answers = [
        (ends[np.array(document.answers, dtype=int) + first] - ends[first]).tolist() if document.answers else []
        for document, first in zip(documents, last[:-1], strict=True)
    ]
    flags = [flag for document in documents for flag in (*document.assistant, document.eos_learned)]
    mask = np.repeat(np.array(flags, bool), np.diff(ends)) if documents and documents[0].assistant else None
    if mask is not None:
        mask[[ends[first] for document, first in zip(documents, last[:-1], strict=True) if document.starts]] = True
    return Encoded(np.insert(ids, text_ends[before], np.array(special, ids.dtype)), ends[last], mask, answers)
