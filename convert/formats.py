"""Rows of a hub's files that are read as text: JSONL, JSON, CSV, TSV and plain text lines.

Read here and not by `datasets`, which takes such files in blocks of many rows: so one bad row costs one row, and a
row of 100 MB stays within a worker's memory.
"""

import csv
import functools
import itertools
import re
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from convert.documents import LONG_LINE, Dropped, parse_line
from convert.reading import BOM, LONGEST_LINE, RAW_SHOWN, Position, Row, Span, jsonl_rows, open_lines, read_line
from convert.sources import check_columns

BITE = 1 << 20  # bytes of an array read at a time
_FORMAT = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|txt)(\.(gz|zst|bz2|xz))?$")
_MARK = re.compile(rb'["\[\]{},]')
_QUOTED = re.compile(rb'["\\]')


def is_text(file: str) -> bool:
    """Whether this module reads a file of that name."""
    return _FORMAT.search(file) is not None


def rows_of_text(span: Span, column: str | None, start: Position, below: BufferedReader) -> Iterator[Row]:
    """The rows of a whole file, open as `below`, from `start` on; `column` as for `rows_of_file`.

    Raises `ValueError` and `EOFError` for a damaged file, `UserError` for columns that are not there.
    """
    found = _FORMAT.search(span.file)
    kind = found[1] if found else None
    if kind == "txt":
        check_columns(span.file, ["text"], column)
        yield from jsonl_rows(span, start, below, lambda line: {"text": line})
    elif kind in ("jsonl", "ndjson") or (kind == "json" and start.offset is not None):
        yield from jsonl_rows(span, start, below)
    elif kind in ("csv", "tsv"):
        yield from _csv_rows(span, column, start.number, open_lines(span, below, Position())[0])
    else:  # nothing read yet, or an array, whose rows have no place of their own in the file
        file = open_lines(span, below, Position())[0]
        begun = file.peek(1).removeprefix(BOM).lstrip()[:1]
        if begun == b"[":
            yield from _array_rows(start.number, file)
        else:
            below.seek(0)
            yield from jsonl_rows(span, start, below)


def _csv_rows(span: Span, column: str | None, skip: int, file: BufferedReader) -> Iterator[Row]:
    """The first row names the columns. A row with more fields than names, or with a line too long, is rejected."""
    csv.field_size_limit(LONGEST_LINE)
    if file.peek(len(BOM)).startswith(BOM):
        file.read(len(BOM))
    lines = iter(functools.partial(_csv_line, file, span.delimiter), "")
    names = [name.encode("latin-1").decode() for name in next(csv.reader(lines, delimiter=span.delimiter), [])]
    wanted = check_columns(span.file, names, column)
    reader = csv.reader(lines, delimiter=span.delimiter)
    for number in itertools.count():
        value: Any
        size = 0
        try:
            fields = next(reader)
            if not fields:  # a blank line
                value = None
            elif len(fields) > len(names):
                value = Dropped("rejected", "unparseable")
            else:
                size = sum(map(len, fields))
                row = dict(zip(names, fields, strict=False))
                value = {name: row[name].encode("latin-1") for name in wanted if name in row}
                del row
            del fields
        except StopIteration:
            return
        except csv.Error:
            value = Dropped("rejected", "unparseable")
        if size > LONG_LINE:
            # The last one keeps 4 bytes for each character of its longest field.
            reader = csv.reader(lines, delimiter=span.delimiter)
        if number >= skip:
            raw = None if isinstance(value, Dropped) else value
            yield Row(value, raw, number, 0.0, Position(number + 1))
        del value


def _csv_line(file: BufferedReader, delimiter: str) -> str:
    """The next line, one character a byte; nothing at the end."""
    line, size = read_line(file)
    if line is None:  # whatever row this belongs to is rejected, for its NUL or for its number of fields
        return "\0" + delimiter * 1000 + "\n"
    return line.decode("latin-1") if size else ""


def _array_rows(skip: int, file: BufferedReader) -> Iterator[Row]:
    number = 0
    for item in _items(file):
        number += 1
        if number <= skip:
            continue
        if item is None:
            row = Row(Dropped("rejected", "line_too_long"), None, number - 1, 0.0, Position(number))
        else:
            row = Row(parse_line(item), item[:RAW_SHOWN], number - 1, 0.0, Position(number), len(item))
        del item  # or it would be in memory while its row is worked on
        yield row


def _items(file: BufferedReader) -> Iterator[bytes | None]:
    """The items of the JSON array in a file, as they stand there; `None` for one longer than `LONGEST_LINE`."""
    depth, quoted, escaped, long = 0, False, False, False
    item = bytearray()
    while chunk := file.read(BITE):
        begin, at = 0, int(escaped)  # a character behind a backslash says nothing
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
                    return
        item += chunk[begin:]
        if len(item) > LONGEST_LINE:
            item, long = bytearray(), True
    raise EOFError("its array does not end")
