"""Rows of text files: the same ones as the field's libraries find, and a bad one costs one."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from chimera.cli import UserError
from chimera.convert.read import formats, reading
from chimera.convert.read.parsing import Dropped
from chimera.convert.read.readers import reader_of
from chimera.convert.read.reading import Position, Row, Span
from tests.convert.builds import LIMITS

START = Position()
UNPARSEABLE = Dropped("rejected", "unparseable")
TEXTS = st.text(st.sampled_from('aè😀"\\,[]{}: \n'), max_size=12)


def rows(name: str, body: bytes, start: Position = START, column: str = "text") -> list[Row]:
    below: Any = io.BufferedReader(io.BytesIO(body))
    return list(reader_of(name).rows(below, Span("hub", name, 0, None, 0), column, start, LIMITS))


def starts_again_behind_any_row(name: str, body: bytes) -> bool:
    whole = rows(name, body)
    return all(rows(name, body, row.after) == whole[i + 1 :] for i, row in enumerate(whole))


@given(st.lists(st.dictionaries(TEXTS, TEXTS | st.lists(TEXTS, max_size=2), max_size=3), max_size=5), st.booleans())
def test_the_items_of_an_array_are_those_of_the_json_module(items: list[Any], indented: bool) -> None:
    body = json.dumps(items, ensure_ascii=False, indent=1 if indented else None).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "BITE", 3)
        found = rows("a.json", body)
    assert [row.value for row in found] == items
    assert [(row.unit, row.number) for row in found] == [("row", i) for i in range(len(items))]
    assert starts_again_behind_any_row("a.json", body)


def test_a_bad_item_of_an_array_costs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    body = b'\xef\xbb\xbf [{"text": "a"}, {"text" 1}, [1], ' + b'{"text": "' + b"x" * 500 + b'"}, {"text": "b"}]\n'
    monkeypatch.setattr(formats, "BITE", 64)
    monkeypatch.setattr(formats, "LONGEST_LINE", 200)
    long, other = Dropped("rejected", "line_too_long"), Dropped("rejected", "not_an_object")
    assert [row.value for row in rows("a.json", body)] == [{"text": "a"}, UNPARSEABLE, other, long, {"text": "b"}]
    with pytest.raises(EOFError):
        rows("a.json", body[:-40])


def test_json_that_is_no_array_is_read_by_line() -> None:
    body = b'{"text": "a"}\nbroken\n{"text": "b"}\n'
    found = rows("a.json", body)
    assert [row.value for row in found] == [{"text": "a"}, UNPARSEABLE, {"text": "b"}]
    assert [(row.unit, row.number) for row in found] == [("line", 1), ("line", 2), ("line", 3)]
    assert starts_again_behind_any_row("a.json", body)


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=6), st.booleans())
def test_the_rows_of_csv_are_those_of_the_csv_module(table: list[tuple[str, str]], bom: bool) -> None:
    out = io.StringIO(newline="")
    csv.writer(out).writerows([("text", "other"), *table])
    body = b"\xef\xbb\xbf" * bom + out.getvalue().encode()
    assert [row.value for row in rows("a.csv", body)] == [{"text": text.encode()} for text, _ in table]
    assert starts_again_behind_any_row("a.csv", body)


def test_a_bad_row_of_csv_costs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LONG_LINE", 3)
    monkeypatch.setattr(reading, "LONGEST_LINE", 100)
    body = b'id,text\n1,one\n2,two,more\n3\n\n4,"fo\nur"\n5,' + b"x" * 200 + b"\n6,six\n7," + b'"",' * 99 + b"\n8,a\0\n"
    found = [row.value for row in rows("a.csv", body)]
    good, short = [{"text": b"one"}, UNPARSEABLE, {}, None, {"text": b"fo\nur"}], [UNPARSEABLE, {"text": b"a\0"}]
    assert found == [*good, UNPARSEABLE, {"text": b"six"}, *short]
    with pytest.raises(UserError, match=r"a\.csv has no column `body`: set `column` to one of id, text"):
        rows("a.csv", body, column="body")


@pytest.mark.parametrize(
    ("body", "row"),
    [
        (b'id,text\n1,a\n2,"b\n3,c\n4,d\n', 1),
        (b'id,text\n1,a\n2,"b', 1),
        (b'text,id\n"' + b"z" * 200 + b'\nfake row,9\nend",1\ngood,2\n', 0),
        (b'id,text\n1,a\n2,"b\n' + b"z" * 200 + b'"\ngood,2\n', 1),
        (b'id,text\n1,"' + b"line\n" * 40 + b'"\n2,good\n', 0),
    ],
)
def test_behind_a_quote_that_is_not_closed_no_row_is_made_up(
    body: bytes, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (formats, reading):
        monkeypatch.setattr(module, "LONGEST_LINE", 100)
    with pytest.raises(UserError, match=rf"a\.csv: the quote that row {row} opens is not closed"):
        rows("a.csv", body)


def test_a_carriage_return_ends_a_row_of_csv() -> None:
    body = b'id,text\r1,a\r2,"b\rb\r\nb"\r\n3,c\r'
    assert [row.value for row in rows("a.csv", body)] == [{"text": b"a"}, {"text": b"b\rb\r\nb"}, {"text": b"c"}]
    assert starts_again_behind_any_row("a.csv", body)


@pytest.mark.parametrize("more", [b'[{"text": "b"}]', b"]", b', {"text": "b"}]', b"}"])
def test_what_follows_an_array_is_not_passed_over(more: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BITE", 4)
    assert [row.value for row in rows("a.json", b'[{"text": "a"}]' + b" \n" * 9)] == [{"text": "a"}]
    with pytest.raises(UserError, match=r"a\.json: more follows after the bracket that closes its array"):
        rows("a.json", b'[{"text": "a"}]' + b" \n" * 9 + more)


def test_lines_of_text_are_rows() -> None:
    body = "uno\n\ndue è\r\ntre".encode()
    assert [row.value for row in rows("a.txt", body)] == [
        {"text": t.encode()} if t else None for t in ("uno", "", "due è", "tre")
    ]
    assert starts_again_behind_any_row("a.txt", body)
    with pytest.raises(UserError, match=r"a\.txt has no column `body`: set `column` to one of text"):
        rows("a.txt", body, column="body")


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("gz", gzip.compress), ("zst", zstandard.compress), ("bz2", bz2.compress), ("xz", lzma.compress)],
)
@pytest.mark.parametrize("body", [b'[{"text": "a"}, {"text": "b"}]', b'{"text": "a"}\n{"text": "b"}\n'])
def test_packed_files_hold_the_same_rows(suffix: str, pack: Callable[[bytes], bytes], body: bytes) -> None:
    name = f"a.json.{suffix}"
    assert [row.value for row in rows(name, pack(body))] == [{"text": "a"}, {"text": "b"}]
    assert starts_again_behind_any_row(name, pack(body))
    with pytest.raises(UserError, match="no reader for this kind of file"):
        reader_of(f"a.parquet.{suffix}")
