"""Rows of files that are read as text beside JSONL: JSON arrays, CSV, TSV and plain text lines.

Read here and not by `datasets`, which takes such files in blocks of many rows: so one bad row costs one row, and a
row of 100 MB stays within a worker's memory.
"""

import csv
import itertools
import re
import sys
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from chimera.cli import UserError
from chimera.convert.read.columns import check_columns
from chimera.convert.read.parsing import LONG_LINE, Dropped, parse_line
from chimera.convert.read.reading import (
    BOM,
    LONGEST_LINE,
    RAW_SHOWN,
    Position,
    Row,
    Span,
    Wanted,
    check_line,
    jsonl_rows,
    open_lines,
    read_line,
)
from chimera.limits import Limits

BITE = 1 << 20  # bytes of an array read at a time
_MARK = re.compile(rb'["\[\]{},]')
_QUOTED = re.compile(rb'["\\]')
_LONE_CR = re.compile(r"\r(?!\n)")
_NUL = "\u0100" if sys.version_info < (3, 11) else "\0"  # what stands for one, which 3.10's csv module refuses
_MORE_FIELDS = 1 << 16  # fields; more than any file has columns


def text_rows(file: BufferedReader, span: Span, column: Wanted, start: Position, limits: Limits) -> Iterator[Row]:
    """The lines of a text, each a row of one column, `text`."""
    check_columns(span.file, ["text"], column)
    yield from jsonl_rows(file, span, column, start, limits, lambda line: {"text": line})


def json_rows(file: BufferedReader, span: Span, column: Wanted, start: Position, limits: Limits) -> Iterator[Row]:
    """The items of an array, or lines. Raises `EOFError` and `UserError` as `_items` does."""
    if start.offset is None:  # nothing read yet, or an array, whose rows have no place of their own in the file
        plain = open_lines(span, file, Position())[0]
        if plain.peek(1).removeprefix(BOM).lstrip()[:1] == b"[":
            yield from _array_rows(span.file, start.number, plain, limits)
            return
        file.seek(0)
    yield from jsonl_rows(file, span, column, start, limits)


def csv_rows(file: BufferedReader, span: Span, column: Wanted, start: Position, limits: Limits) -> Iterator[Row]:
    """The first row names the columns. A row with more fields than names, or with a line too long, is rejected.

    Raises `UserError` for a column that is not there, and where rows cannot be told apart: a quote is not closed.
    """
    file = open_lines(span, file, Position())[0]
    csv.field_size_limit(LONGEST_LINE)
    if file.peek(len(BOM)).startswith(BOM):
        file.read(len(BOM))
    lines = _CsvLines(file, span.delimiter)
    names = [name.encode("latin-1").decode() for name in next(csv.reader(lines, delimiter=span.delimiter), [])]
    wanted = check_columns(span.file, names, column)
    reader = csv.reader(lines, delimiter=span.delimiter)
    for number in itertools.count():
        value: Any
        size = lines.given = 0
        try:
            fields = next(reader)
            if lines.ended:  # the reader looks for more lines where a quote is open, and only there
                raise csv.Error
        except StopIteration:
            return
        except csv.Error:  # or a field above the limit, which lines are not
            raise UserError(
                f"{span.file}: the quote that row {number} opens is not closed, so no row after it can be told from "
                "its text: fix the file or take another source"
            ) from None
        if not fields:  # a blank line
            value = None
        elif len(fields) > len(names):
            value = Dropped("rejected", "unparseable")
        else:
            size = sum(map(len, fields))
            row = dict(zip(names, fields, strict=False))
            value = {name: row[name].replace(_NUL, "\0").encode("latin-1") for name in wanted if name in row}
            del row
        del fields
        if size > LONG_LINE:
            # The last one keeps 4 bytes for each character of its longest field.
            reader = csv.reader(lines, delimiter=span.delimiter)
        check_line(span.file, f"row {number}", size, limits)
        if number >= start.number:
            raw = None if isinstance(value, Dropped) else value
            yield Row(value, raw, number, 0.0, Position(number + 1))
        del value


class _CsvLines:
    """The lines of a CSV file, one character a byte; each ends in a newline, a carriage return or both.

    A line that is too long is replaced by one of so many fields that its row is rejected. Raises `csv.Error` where a
    quote is open at its beginning or end, as it is then unknown where its row ends.
    """

    def __init__(self, file: BufferedReader, delimiter: str) -> None:
        self._file, self._delimiter = file, delimiter
        self._found: Iterator[str] = iter(())
        self.given = 0  # lines given out for the row at hand; the reader of rows sets it back to 0
        self.ended = False

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        while (line := next(self._found, None)) is None:
            self._found = self._read()
        self.given += 1
        return line

    def _read(self) -> Iterator[str]:
        quotes = 0

        def count(part: bytes) -> None:
            nonlocal quotes
            quotes += part.count(b'"')

        line, size = read_line(self._file, count)
        if not size:
            self.ended = True
            raise StopIteration
        if line is not None:
            return _parted(line.decode("latin-1").replace("\0", _NUL))
        if self.given or quotes % 2:
            raise csv.Error
        return iter([self._delimiter * _MORE_FIELDS])


def _parted(line: str) -> Iterator[str]:
    """A line cut after its carriage returns."""
    begin = 0
    for end in _LONE_CR.finditer(line):
        yield line[begin : end.end()]
        begin = end.end()
    if begin < len(line):
        yield line[begin:]


def _array_rows(name: str, skip: int, file: BufferedReader, limits: Limits) -> Iterator[Row]:
    number = 0
    for item in _items(name, file):
        number += 1
        if number <= skip:
            continue
        check_line(name, f"row {number - 1}", len(item or b""), limits)
        if item is None:
            row = Row(Dropped("rejected", "line_too_long"), None, number - 1, 0.0, Position(number))
        else:
            row = Row(parse_line(item), item[:RAW_SHOWN], number - 1, 0.0, Position(number), len(item))
        del item  # or it would be in memory while its row is worked on
        yield row


def _items(name: str, file: BufferedReader) -> Iterator[bytes | None]:
    """The items of the JSON array in a file, as they stand there; `None` for one longer than `LONGEST_LINE`.

    Raises `UserError` naming the file (`name`) where more follows its end, as after a bracket too many.
    """
    depth, quoted, escaped, long = 0, False, False, False
    item = bytearray()
    while chunk := file.read(BITE):
        begin, at = 0, int(escaped)  # a character after a backslash says nothing
        escaped = False
        while mark := (_QUOTED if quoted else _MARK).search(chunk, at):
            at = mark.end()
            if mark[0] == b"\\":
                escaped = at == len(chunk)
                at += 1
                continue
            if mark[0] == b'"':
                quoted = not quoted
                continue
            depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(mark[0], 0)
            if depth == 1 and mark[0] == b"[":  # the array's own
                item, begin = bytearray(), at
            elif depth == 0 or (depth == 1 and mark[0] == b","):
                item += chunk[begin : at - 1]
                whole = [None if long else bytes(item).strip()]
                item, begin, long = bytearray(), at, False
                if whole != [b""]:
                    yield whole.pop()
                if depth == 0:
                    rest = chunk[at:]
                    while rest and not rest.strip():
                        rest = file.read(BITE)
                    if rest:
                        raise UserError(
                            f"{name}: more follows after the bracket that closes its array: fix the file or take "
                            "another source"
                        )
                    return
        item += chunk[begin:]
        if len(item) > LONGEST_LINE:
            item, long = bytearray(), True
    raise EOFError("its array does not end")
