"""Rows and what they hold → batches that are encoded together, and of their documents those of each split."""

from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from chimera.convert.encode.assembling import Encoded
from chimera.convert.encode.document import Document
from chimera.convert.read.parsing import Dropped
from chimera.convert.read.reading import Row
from chimera.mds import Array

BATCH_BYTES = 1 << 19  # of text encoded together; a larger document is a batch of its own
BATCH_ROWS = 1024
Found = tuple[int, Row, Document | Dropped | None]  # span, row, what it holds (`None`: a blank line)


def batches(found: Iterator[Found]) -> Iterator[list[Found]]:
    """Rows in order, in lists of about `BATCH_BYTES` of text."""
    batch: list[Found] = []
    size = 0
    for item in found:
        more = item[2].size if isinstance(item[2], Document) else _size(item[1].raw)
        if batch and more >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += more
        del item  # or its text would live on beside the blocks it becomes
        if size >= BATCH_BYTES or len(batch) >= BATCH_ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(reject: object) -> int:
    return len(reject) if isinstance(reject, bytes) else 1


def split_of(document: Document, eval_fraction: float) -> str:
    """`eval` for a fixed share of all documents, by their text alone, so that equal ones fall together.

    Documents of one row fall together too: the last of them has the text of all.
    """
    return "eval" if text_digest(document) < eval_fraction * 2**64 else "train"


def text_digest(document: Document) -> int:
    """XXH3 (64 bits) of the text of a row's documents."""
    texts = (document.more[-1] if document.more else document).texts
    if len(texts) == 1:
        return xxhash.xxh3_64_intdigest(texts[0])
    digest = xxhash.xxh3_64()
    for text in texts:
        digest.update(text)
    return digest.intdigest()


def in_eval(documents: Sequence[Document], eval_fraction: float) -> Array:
    """Which documents are of the eval split: [documents] bool."""
    return np.array([split_of(document, eval_fraction) == "eval" for document in documents], bool)


def until(limit: int, lengths: Array) -> int | None:
    """How many documents of these `lengths` (tokens) reach `limit`; `None` where all together do not."""
    reached = int(np.searchsorted(np.cumsum(lengths), limit))
    return reached + 1 if reached < len(lengths) else None


def chosen(encoded: Encoded, which: Array) -> tuple[Array, Array]:
    """Of the first texts those for which `which` is true: their ids, and where each begins and the last ends."""
    lengths = np.diff(encoded.ends)
    if len(which) == len(lengths) and which.all():
        return encoded.ids, encoded.ends
    edges = np.flatnonzero(np.diff(which, prepend=False, append=False))  # where runs of them begin and end
    begins, ends = encoded.ends[edges].reshape(-1, 2).T.tolist()
    runs = [encoded.ids[begin:end] for begin, end in zip(begins, ends, strict=True)]
    return np.concatenate([encoded.ids[:0], *runs]), np.cumsum([0, *lengths[: len(which)][which]])
