"""Rows in batches that are encoded together, whose documents then go to the train or the eval split."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
import xxhash

from chimera.convert.encode.assembling import Encoded
from chimera.convert.encode.document import Document
from chimera.convert.encode.encoding import Encoder
from chimera.convert.read.parsing import Dropped
from chimera.convert.read.reading import RAW_SHOWN, Row
from chimera.mds import Array
from chimera.tokenizer_file import gave_up

BATCH_BYTES = 1 << 19  # of text encoded together; a larger document is a batch of its own
BATCH_ROWS = 1024
OVERLAP = ("overlap", "rows")  # counts a row that is trained on and is in the validation set too
Counted = tuple[tuple[str, str], ...]
EncodedDocument = tuple[Array, Array | None, list[int]]  # ids, mask, ends of answers
Documents = tuple[str, list[EncodedDocument], Counted]  # a row's: their split, each of them, what it counts
ENCODER_FAILED = Dropped("rejected", "encoder_failed")
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


def in_eval(documents: Sequence[Document], eval_fraction: float) -> Array:
    """Which documents, each of a row of its own, are of the eval split: [documents] bool."""
    below = eval_fraction * 2**64
    return np.array([text_digest(document) < below for document in documents], bool)


def text_digest(document: Document) -> int:
    """XXH3 (64 bits) of the text of a row's documents."""
    texts = (document.more[-1] if document.more else document).texts
    if len(texts) == 1:
        return xxhash.xxh3_64_intdigest(texts[0])
    digest = xxhash.xxh3_64()
    for text in texts:
        digest.update(text)
    return digest.intdigest()


def cut_at(limit: int, batch: list[Found], lengths: Array) -> int:
    """Cut a batch after the text with which the `lengths` (tokens) of its texts reach `limit`; how many it has now."""
    last = int(np.searchsorted(np.cumsum(lengths), limit))
    if last < len(lengths):
        texts = [index for index, (_, _, found) in enumerate(batch) if isinstance(found, Document)]
        del batch[texts[last] + 1 :]
    return last + 1


def overlapping(batch: list[Found], kept: Array) -> int:
    """How many texts of a batch are in the validation set too, of those that are `kept` [texts] bool."""
    rows = [row for _, row, found in batch if isinstance(found, Document)]
    return sum(row.held_out for row, keep in zip(rows, kept.tolist(), strict=True) if keep)


def chosen(encoded: Encoded, which: Array) -> tuple[Array, Array]:
    """Of the first texts those for which `which` is true: their ids, and where each begins and the last ends."""
    lengths = np.diff(encoded.ends)
    if len(which) == len(lengths) and which.all():
        return encoded.ids, encoded.ends
    edges = np.flatnonzero(np.diff(which, prepend=False, append=False))  # where runs of them begin and end
    begins, ends = encoded.ends[edges].reshape(-1, 2).T.tolist()
    runs = [encoded.ids[begin:end] for begin, end in zip(begins, ends, strict=True)]
    return np.concatenate([encoded.ids[:0], *runs]), np.cumsum([0, *lengths[: len(which)][which]])


def encoded_rows(
    batch: list[Found], encoder: Encoder, eval_fraction: float, rejected: Callable[[int, Row, Dropped], bytes | None]
) -> list[tuple[int, Row, Documents | Dropped | None]]:
    """The rows of a batch with their documents encoded, for going on row by row.

    `rejected` makes the reject line of one that the tokenizer fails on. Empties `batch`, so that a long text is not
    kept beside its ids.
    """
    held = [found for _, _, found in batch if isinstance(found, Document)]
    splits = [split_of(document, eval_fraction) for document in held]
    counted = [document.counted for document in held]
    of_rows = zip(splits, _encoded(held, encoder), counted, strict=True)
    rows: list[tuple[int, Row, Documents | Dropped | None]] = []
    for span, row, found in batch:
        if isinstance(found, Document):
            split, documents, counts = next(of_rows)
            if documents is None:
                row.raw, row.length = b"".join(found.texts)[:RAW_SHOWN], found.size
                row.raw = rejected(span, row, ENCODER_FAILED)
                rows.append((span, row, ENCODER_FAILED))
                continue
            more = [("ignored", name) for name in row.unread] + [OVERLAP] * row.held_out
            rows.append((span, row, (split, documents, (*counts, *more))))
        else:
            rows.append((span, row, found))
    batch.clear()
    return rows


def _encoded(held: list[Document], encoder: Encoder) -> list[list[EncodedDocument] | None]:
    """The documents of each row; None for a row that the tokenizer fails on (by a panic, say)."""
    try:
        encoded = iter(encoder.encode_turns([each for first in held for each in (first, *first.more)]))
        return [list(islice(encoded, 1 + len(first.more))) for first in held]
    except BaseException as error:
        if not gave_up(error):
            raise
    return [None] if len(held) == 1 else [found for first in held for found in _encoded([first], encoder)]
