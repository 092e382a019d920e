"""Rows of local files from any position; here JSONL, line by line (parquet: `columnar.py`).

JSONL is cut at newline bytes and read here, not by a library, so that one bad line costs one line. Every reader
yields rows with the position behind them: starting again there gives the rows that follow, none lost or repeated.
(The checksum of compressed data is known at its end: one that fails takes back what came before, see `Damaged`.)
"""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from chimera.cli import UserError
from convert.documents import Dropped, parse_line

BOM = b"\xef\xbb\xbf"
LONGEST_LINE = 101 << 20  # bytes; a longer line is rejected unread, so that a worker stays below 1 GiB
RAW_SHOWN = 1 << 20  # bytes of a rejected row that its reject line shows
_PACKED = (".gz", ".zst", ".bz2", ".xz")


class Damaged(UserError):
    """A file proved damaged behind rows that were read of it: they may be what the damage made of others."""


@dataclass(frozen=True)
class Span:
    """A contiguous piece of one file.

    `begin` and `end` count bytes (`jsonl`: the lines that start in [begin, end)), row groups (`parquet`) or nothing
    (`hub`, compressed JSONL: the whole file). `bytes` is its share of the progress bar.
    """

    kind: str  # jsonl | parquet | hub
    file: str
    begin: int
    end: int | None
    bytes: int
    delimiter: str = ","  # of CSV
    size: int | None = None  # bytes the whole file had when it was cut into ranges


class Position(NamedTuple):
    """Where the next row of a span starts: rows or physical lines passed, and for JSONL the byte in the file."""

    number: int = 0
    offset: int | None = None


@dataclass(slots=True)
class Row:
    """One row; its consumer may set `value` and `raw` to `None`, so that a long line is in memory only once."""

    value: object  # a mapping of columns, `Dropped` where none could be read, `None` for a blank line
    raw: object  # what a reject file shows: the line's first `RAW_SHOWN` bytes, or the mapping
    number: int  # row of the file, from 0; for JSONL the line, from 1 at the span's start
    size: float  # share of `Span.bytes`
    after: Position
    length: int = 0  # bytes of a line
    unit: str = "row"  # what `number` counts: `row` or `line`


def rows_of_file(span: Span, column: str | None, start: Position, scratch: Path | None = None) -> Iterator[Row]:
    """Rows of a local span from `start`; `column` is the text column (`None`: those of a conversation).

    `scratch` is the folder for what must be kept on disk meanwhile (`None`: the system's). Raises `UserError` naming
    the file when it is damaged or gone.
    """
    try:
        if span.kind == "parquet":
            from convert.columnar import conversation_columns, open_parquet, parquet_rows

            with open(span.file, "rb") as file, open_parquet(span.file, file) as parquet:
                columns = [column] if column else conversation_columns(parquet.schema_arrow.names)
                yield from parquet_rows(parquet, file, span, columns, start, scratch)
        else:
            with open(span.file, "rb") as file:
                yield from jsonl_rows(span, start, file)
    except (OSError, EOFError, ValueError, OverflowError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
            raise  # the disk's own troubles keep their name
        kind = UserError if isinstance(error, FileNotFoundError) else Damaged
        raise kind(
            f"{span.file} cannot be read to its end: {error}: mend the file, or remove it and set `rebuild=true`"
        ) from error


def jsonl_rows(
    span: Span, start: Position, below: io.BufferedReader, parse: Callable[[bytes], object] = parse_line
) -> Iterator[Row]:
    """Rows of a JSONL file, open as `below`; `parse` makes a row's value of a line."""
    packed = span.file.endswith(_PACKED)
    file, offset = open_lines(span, below, start)
    number, seen = start.number, below.tell()
    while span.end is None or offset < span.end:
        line, size = read_line(file)
        if not size:
            if span.end is not None:
                raise EOFError(f"it ends {span.end - offset} bytes before where it did when the build began")
            return
        at_start = offset == 0
        offset, number = offset + size, number + 1
        if span.size is not None and (offset > span.size or (offset < span.size and line and not line.endswith(b"\n"))):
            raise EOFError(f"a line does not end where it did when the build began and the file had {span.size} bytes")
        size, seen = (below.tell() - seen, below.tell()) if packed else (size, 0)
        after = Position(number, offset)
        if line is None:
            yield Row(Dropped("rejected", "line_too_long"), None, number, size, after, unit="line")
            continue
        line = line.removeprefix(BOM).rstrip(b"\r\n") if at_start else line.rstrip(b"\r\n")
        row = Row(None, line[:RAW_SHOWN], number, size, after, len(line), "line")
        if line and not line.isspace():
            row.value = parse(line)
        del line  # or it would be in memory beside the next one
        yield row


def open_lines(span: Span, below: io.BufferedReader, start: Position) -> tuple[io.BufferedReader, int]:
    """A buffered file positioned at the start of a line, and that position in bytes."""
    if span.file.endswith(_PACKED):
        if not below.peek(1):  # Python's readers accept this, though even no data has a header once packed
            raise EOFError("the compressed data is cut off")
        readers: dict[str, Callable[[Any], Any]] = {"gz": gzip.GzipFile, "bz2": bz2.BZ2File, "xz": lzma.LZMAFile}
        reader = readers.get(span.file.rpartition(".")[2], _Zstd)
        file = io.BufferedReader(reader(fileobj=below) if reader is gzip.GzipFile else reader(below), 1 << 20)
        left = start.offset or 0
        while left:  # a compressed file has no seek that costs less than reading
            got = len(file.read(min(left, 1 << 20)))
            if not got:
                raise EOFError(f"it ends {left} bytes before the place an earlier run had reached")
            left -= got
        return file, start.offset or 0
    file = below
    if start.offset is not None or span.begin == 0:
        file.seek(start.offset or 0)
    else:  # the line that runs into this range belongs to the one before
        file.seek(span.begin - 1)
        while span.end is None or file.tell() < span.end:  # a line longer than the range leaves it without any
            skipped = file.readline(1 << 20)
            if not skipped or skipped.endswith(b"\n"):
                break
    return file, file.tell()


def read_line(file: BinaryIO, passed: Callable[[bytes], object] = len) -> tuple[bytes | None, int]:
    """The next line with its newline and its bytes; `None` for one longer than `LONGEST_LINE`.

    The bytes of such a line are not kept; `passed` is called with them, some at a time.
    """
    line = file.readline(LONGEST_LINE)
    size = len(line)
    if size < LONGEST_LINE or line.endswith(b"\n"):
        return line, size
    passed(line)
    del line
    while True:
        rest = file.readline(1 << 20)
        passed(rest)
        size += len(rest)
        if not rest or rest.endswith(b"\n"):
            return None, size


class _Zstd(io.RawIOBase):
    """Decompresses a .zst of one or more frames; unlike the library's reader it notices a cut-off end."""

    def __init__(self, below: BinaryIO) -> None:
        import zstandard

        self._below, self._new_frame = below, zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._compressed, self._plain = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        while not self._plain:
            # small bites: a kilobyte of zstd can hold megabytes of text
            self._compressed = self._compressed or self._below.read(4096)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the compressed data is cut off")
                return 0
            self._frame = self._frame or self._new_frame()
            try:
                self._plain = memoryview(self._frame.decompress(self._compressed))
            except zstandard.ZstdError as error:
                if "too much memory" in str(error):
                    raise ValueError("its zstd window is above 128 MB: compress it again without --long") from None
                raise ValueError(f"not valid zstd data ({error})") from None
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._plain))
        buffer[:size] = self._plain[:size]
        self._plain = self._plain[size:]
        return size


def reject_line(file: str, reason: str, row: Row) -> bytes:
    """One line of a reject file; bytes that are not UTF-8 stand as `\\udcXX` escapes (Python's surrogateescape).

    Of a row longer than `RAW_SHOWN` only the beginning is shown, and `raw_length` says how long it is.
    """
    raw, length = row.raw, row.length
    if raw is not None and not isinstance(raw, bytes):
        raw = json.dumps(raw, default=_text, ensure_ascii=False)
        length = len(raw)
    entry = {"file": file, row.unit: row.number, "reason": reason, "raw": raw[:RAW_SHOWN] if raw is not None else None}
    if length > RAW_SHOWN:
        entry["raw_length"] = length
    return json.dumps(entry, default=_text).encode() + b"\n"


def _text(value: object) -> str:
    """A column value JSON has no word for."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
