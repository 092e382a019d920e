"""The ids of texts, and special tokens → the ids of documents, for all documents of a batch at once."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np

from chimera.convert.encode.document import Document, Piece
from chimera.mds import Array

BATCH = 1 << 20  # characters or bytes handed to an engine at a time
T = TypeVar("T", str, bytes, Piece)


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
        """The ids, mask and answers of each document.

        Each of several is copied: one that waits long for its block would keep all of them in memory.
        """
        alone = len(self.ends) == 2
        for index, (begin, end) in enumerate(pairwise(self.ends.tolist())):
            ids, mask = (None if a is None else a if alone else a[begin:end].copy() for a in (self.ids, self.mask))
            assert ids is not None
            yield ids, mask, self.answers[index] if self.answers else []


def batched(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Texts, and special tokens between them, in lists of about `BATCH`; mostly all of them are one."""
    if sum(len(item) for item in items if not isinstance(item, int)) < BATCH:
        yield items
        return
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += 1 if isinstance(item, int) else len(item)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def woven(pieces: Sequence[Piece], ids: Array, ends: Array) -> tuple[Array, Array]:
    """The ids of pieces in order, and the length of each, from the `ids` of those that are texts and their `ends`."""
    is_text = np.array([isinstance(piece, bytes) for piece in pieces], bool)
    lengths = np.ones(len(pieces), np.int64)
    lengths[is_text] = np.diff(ends)
    places = ends[np.cumsum(is_text)[~is_text]]
    special = np.array([piece for piece in pieces if not isinstance(piece, bytes)], ids.dtype)
    return np.insert(ids, places, special), lengths


def assembled(documents: Sequence[Document], before: int, ids: Array, lengths: Array) -> Encoded:
    """Documents from the ids of all of their pieces and the length of each, with EOS and `before` of BOS."""
    counts = np.cumsum([0, *(before + len(document.pieces) + 1 for document in documents)])
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if not any(document.assistant for document in documents):
        return Encoded(ids, ends[counts])
    flags = [flag for document in documents for flag in (*document.assistant, document.eos_learned)]
    answers = [
        (ends[np.array(document.answers, dtype=int) + first] - ends[first]).tolist() if document.answers else []
        for document, first in zip(documents, counts.tolist(), strict=False)
    ]
    mask = np.repeat(np.array(flags, bool), lengths)
    mask[ends[counts[:-1]][[document.starts for document in documents]]] = True
    return Encoded(ids, ends[counts], mask, answers)
