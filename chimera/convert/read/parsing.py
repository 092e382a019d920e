"""A row as it was parsed: an object, or why it is dropped.

A row is *rejected* when it is broken (kept aside with its reason) and *filtered* when it is sound but not wanted.
"""

import codecs
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

CHUNK = 1 << 17  # bytes of UTF-8: longer texts are kept as bytes, a `str` of them may take four times as much
LONG_LINE = 1 << 20  # bytes


MOST_VALUES = 1 << 20  # of a long line; as objects of Python they take a hundred times their bytes


_LOW_ESCAPE = re.compile(rb"\\u[dD][cC][89a-fA-F]")


_ESCAPE = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][cC][89a-fA-F][0-9a-fA-F])|.)", re.DOTALL)


@dataclass(frozen=True)
class Dropped:
    kind: Literal["filtered", "rejected"]
    reason: str


def parse_line(line: bytes) -> dict[str, Any] | Dropped:
    """One JSONL line (without a byte-order mark) as an object."""
    value = parse_json(line)
    return value if isinstance(value, (dict, Dropped)) else Dropped("rejected", "not_an_object")


def parse_json(line: bytes) -> Any:
    """A value of JSON, or `Dropped`."""
    if len(line) > LONG_LINE and _values(line) > MOST_VALUES:
        return Dropped("rejected", "too_many_values")
    try:
        long = len(line) > LONG_LINE and not line.isascii()
        return _parse_long(line) if long else _DECODER.decode(line.decode())
    except _DuplicateKey:
        return Dropped("rejected", "duplicate_key")
    except UnicodeDecodeError:
        return Dropped("rejected", "invalid_utf8")
    except (ValueError, RecursionError):  # bad JSON, an integer of thousands of digits, absurd nesting
        return Dropped("rejected", "unparseable")


class _DuplicateKey(ValueError):
    """An object has a key twice, of which `json` would take the last in silence."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _DuplicateKey
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _values(line: bytes) -> int:
    """How many values of JSON a line holds at most, or a number above `MOST_VALUES`.

    There is one after each of these marks, unless the mark is part of a text.
    """

    def count(data: bytes, *place: int) -> int:
        return sum(data.count(mark, *place) for mark in (b",", b":", b"[", b"{"))

    if (found := count(line)) <= MOST_VALUES:
        return found
    line, found, end = line.replace(b"\\\\", b"").replace(b'\\"', b""), 0, 0
    for text in re.finditer(rb'"[^"]*"', line):
        found += count(line, end, text.start())
        end = text.end()
        if found > MOST_VALUES:
            return found
    return found + count(line, end)


def _parse_long(line: bytes) -> Any:
    """`json.loads(line.decode())` with long texts as UTF-8 bytes, in at most 2 bytes a byte.

    Each byte above 127 is read as a surrogate (PEP 383) and made that byte again string by string.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    for at in range(0, len(line), LONG_LINE):
        decoder.decode(line[at : at + LONG_LINE], final=at + LONG_LINE >= len(line))
    if _LOW_ESCAPE.search(line):
        marked = bytearray(line)  # unpaired it would pass for such a byte; udfff does not, nor pairs with the next
        for escape in _ESCAPE.finditer(line):
            if escape[1]:
                marked[escape.start(1) : escape.end(1)] = b"udfff"
        line = bytes(marked)
    return _restored(_DECODER.decode(line.decode("ascii", "surrogateescape")))


def _restored(value: Any) -> Any:
    """A value of JSON with its texts made of the bytes that their surrogates stand for."""
    if isinstance(value, str) and not value.isascii():
        try:
            data = value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # it holds a lone surrogate, which `_pieces` finds
            return value
        return data if len(data) > CHUNK else data.decode()
    if isinstance(value, list):
        return [_restored(item) for item in value]
    if isinstance(value, dict):
        return {_restored(key): _restored(item) for key, item in value.items()}
    return value
