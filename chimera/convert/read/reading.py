"""What every reader gives, rows with the position after each; and the reader of JSONL, line by line.

JSONL is cut at newline bytes and read here, not by a library, so that one bad line costs one line. Starting again at a
position, every reader gives the rows that follow, none lost or repeated.
(The checksum of compressed data is known at its end: one that fails takes back what came before, see `CorruptFile`.)
"""

import bz2
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, BinaryIO, NamedTuple

import zstandard

from chimera.cli import UserError
from chimera.convert.read.parsing import Dropped, parse_line
from chimera.limits import Limits

BOM = b"\xef\xbb\xbf"
LONGEST_LINE = 101 << 20  # bytes; a longer line is rejected unread, so that memory stays bounded
RAW_SHOWN = 1 << 20  # bytes of a rejected row that its reject line shows
PACKED = (".gz", ".zst", ".zstd", ".bz2", ".xz")
TEXT_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md")
TABLE_KINDS = (".parquet", ".arrow", ".feather")
Parse = Callable[[bytes], object]
# What is read of a row: a text's column or columns, or a conversation (`None`: by the usual names; else by these).
Wanted = str | Sequence[str] | Mapping[str, str] | None


class CorruptFile(UserError):
    """Corruption found after rows were already read; those rows cannot be trusted."""


@dataclass(frozen=True)
class Span:
    """A contiguous piece of one file.

    `begin` and `end` count bytes (plain JSONL: the lines that start in [begin, end)) or row groups (parquet). Other
    files, and those of a hub's set, are whole: from 0 to `None`. `bytes` is its share of the progress bar.
    """

    kind: str  # hub | file
    file: str
    begin: int
    end: int | None
    bytes: int
    delimiter: str = ","  # of CSV
    size: int | None = None  # bytes the whole file had when it was cut into ranges
    stored: int | None = None  # bytes of an object in a store,
    etag: str | None = None  # and its tag, as they were then


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
    unread: tuple[str, ...] = ()  # columns of a conversation's table that are passed over
    file: str | None = None  # the row's own, where a span is of many
    held_out: bool = False  # its text is in the validation set


def packing_of(file: str) -> str:
    """How a file is compressed by its name's end, in small letters; empty where it is not."""
    return next((suffix for suffix in PACKED if file.lower().endswith(suffix)), "")


def kind_of(file: str) -> str:
    """The suffix of what is in a file, compressed or not, in small letters; empty for a kind that is not read."""
    suffix = os.path.splitext(file.lower().removesuffix(packing_of(file)))[1]
    return suffix if suffix in TEXT_KINDS or (suffix in TABLE_KINDS and not packing_of(file)) else ""


def jsonl_rows(
    file: BufferedReader, span: Span, _column: Wanted, start: Position, limits: Limits, parse: Parse = parse_line
) -> Iterator[Row]:
    """Rows of an open JSONL file, which may have any columns; `parse` makes a row's value of a line.

    Raises `EOFError` where the file ends or a line breaks elsewhere than when it was cut into ranges.
    """
    packed, raw = bool(packing_of(span.file)), file
    file, offset = open_lines(span, raw, start)
    number, seen = start.number, raw.tell()
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
        size, seen = (raw.tell() - seen, raw.tell()) if packed else (size, 0)
        after = Position(number, offset)
        if line is None:
            yield Row(Dropped("rejected", "line_too_long"), None, number, size, after, unit="line")
            continue
        check_line(span.file, f"the line at byte {offset - len(line)}", len(line), limits)
        line = line.removeprefix(BOM).rstrip(b"\r\n") if at_start else line.rstrip(b"\r\n")
        row = Row(None, line[:RAW_SHOWN], number, size, after, len(line), "line")
        if line and not line.isspace():
            row.value = parse(line)
        del line  # or it would be in memory beside the next one
        yield row


def open_lines(span: Span, raw: BufferedReader, start: Position) -> tuple[BufferedReader, int]:
    """A buffered file positioned at the start of a line, and that position in bytes."""
    if packing := packing_of(span.file):
        if not raw.peek(1):  # Python's readers accept this, though even no data has a header once packed
            raise EOFError("the compressed data is cut off")
        readers: dict[str, Callable[[Any], Any]] = {".gz": gzip.GzipFile, ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile}
        reader = readers.get(packing, _Zstd)
        file = BufferedReader(reader(fileobj=raw) if reader is gzip.GzipFile else reader(raw), 1 << 20)
        left = start.offset or 0
        while left:  # a compressed file has no seek that costs less than reading
            got = len(file.read(min(left, 1 << 20)))
            if not got:
                raise EOFError(f"it ends {left} bytes before the place an earlier run had reached")
            left -= got
        return file, start.offset or 0
    file = raw
    if start.offset is not None or span.begin == 0:
        file.seek(start.offset or 0)
    else:  # the line that runs into this range belongs to the one before
        file.seek(span.begin - 1)
        while span.end is None or file.tell() < span.end:  # a line longer than the range leaves it without any
            skipped = file.readline(1 << 20)
            if not skipped or skipped.endswith(b"\n"):
                break
    return file, file.tell()


def check_line(name: str, what: str, size: int, limits: Limits) -> None:
    """Raise `TooLarge` for a line or row (`what`) that takes more memory than a worker may."""
    limits.check(f"{name}: {what} ({size >> 20} MiB)", size, "take it out")


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

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._new_frame = raw, zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._compressed, self._plain = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            # small bites: a kilobyte of zstd can hold megabytes of text
            self._compressed = self._compressed or self._raw.read(4096)
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
    entry = {
        "file": row.file or file,
        row.unit: row.number,
        "reason": reason,
        "raw": raw[:RAW_SHOWN] if raw is not None else None,
    }
    if length > RAW_SHOWN:
        entry["raw_length"] = length
    return json.dumps(entry, default=_text).encode() + b"\n"


def _text(value: object) -> str:
    """A column value JSON has no word for."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
