"""Which reader a file's rows come from: one for each suffix, the same for local files and those of hub sets."""

import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from io import BufferedReader
from typing import NamedTuple

from chimera.cli import UserError
from chimera.convert.read.arrow import arrow_names, arrow_rows
from chimera.convert.read.formats import csv_rows, json_rows, text_rows
from chimera.convert.read.parquet import parquet_names, parquet_rows
from chimera.convert.read.reading import (
    PACKED,
    TABLE_KINDS,
    TEXT_KINDS,
    CorruptFile,
    Position,
    Row,
    Span,
    Wanted,
    jsonl_rows,
    kind_of,
)
from chimera.convert.read.store_files import open_object
from chimera.limits import Limits
from chimera.stores import StoreError, is_remote
from chimera.text import one_line

Rows = Callable[[BufferedReader, Span, Wanted, Position, Limits], Iterator[Row]]


class Reader(NamedTuple):
    """The rows of a span of an open file from a position on, and the names of its columns if its head tells them."""

    rows: Rows
    names: Callable[[str, BufferedReader, Limits], list[str]] | None = None


READERS = {
    ".parquet": Reader(parquet_rows, parquet_names),
    ".arrow": Reader(arrow_rows, arrow_names),
    ".feather": Reader(arrow_rows, arrow_names),
    ".jsonl": Reader(jsonl_rows),
    ".ndjson": Reader(jsonl_rows),
    ".json": Reader(json_rows),
    ".csv": Reader(csv_rows),
    ".tsv": Reader(csv_rows),
    ".txt": Reader(text_rows),  # of a hub set, by line as `datasets` reads it; local ones: `text_files.py`
}


def reader_of(file: str) -> Reader:
    """The reader of a file by its name's end; `UserError` where there is none."""
    if reader := READERS.get(kind_of(file)):
        return reader
    raise UserError(
        f"{file}: no reader for this kind of file (there is one for {', '.join(TABLE_KINDS)}, and plain "
        f"or with {', '.join(PACKED)} for {', '.join(TEXT_KINDS)}): convert it to parquet or JSONL"
    )


def open_span(span: Span, limits: Limits) -> AbstractContextManager[BufferedReader]:
    """Open the file of a span, local or in a store. Raises `UserError` for an object that is gone or was replaced."""
    if is_remote(span.file):
        assert span.stored is not None
        return open_object(span.file, span.stored, span.etag, limits.retries)
    return open(span.file, "rb")


def rows_of_file(span: Span, column: Wanted, start: Position, limits: Limits) -> Iterator[Row]:
    """Rows of a local span from `start`; `column` is the text column (`None`: those of a conversation).

    Raises `UserError` naming the file when it is damaged or gone, or takes more memory than a worker may.
    """
    reader = reader_of(span.file)
    try:
        with open_span(span, limits) as file:
            yield from reader.rows(file, span, column, start, limits)
    except StoreError:  # which names what is out of reach
        raise
    except (OSError, EOFError, ValueError, OverflowError, zlib.error, lzma.LZMAError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
            raise  # the disk's own troubles keep their name
        kind, why = UserError if isinstance(error, FileNotFoundError) else CorruptFile, one_line(error)
        raise kind(
            f"{span.file} cannot be read to its end: {why}: fix the file, or remove it and set `rebuild=true`"
        ) from error
