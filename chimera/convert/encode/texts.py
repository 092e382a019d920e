"""A text as pieces of UTF-8, or why a row that holds it is rejected.

A text of more than `CHUNK` bytes becomes several pieces, so that time and memory stay linear in it whatever it holds.
Each is cut before a space between two letters or digits; where there is none, before another of `CUT_CHARACTERS`
between two letters or digits; and where there is none of these either, anywhere. With the usual byte-level tokenizers
the ids are those of the whole text wherever there was such a place (`equivalence.same_in_pieces` says which these are);
with another tokenizer, and at a cut anywhere, each piece has its ids as a text of its own. The build names such
tokenizers.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from chimera.convert.read.parsing import CHUNK

Texts = tuple[bytes, ...]  # one text, in order

CUT_CHARACTERS = " \n,.、。，"
_BEFORE_SPACE, _BEFORE_MARK = (re.compile(rf"(?<=[^\W_])[{marks}](?=[^\W_])") for marks in (" ", CUT_CHARACTERS))


class Reject(Exception):
    """Why a row is rejected; `DocumentReader.read` turns it into `Dropped`."""


def chunks(data: bytes) -> Iterator[bytes]:
    """UTF-8 in pieces, cut as this module says. Raises `UnicodeDecodeError`."""
    start = 0
    while len(data) - start > CHUNK:
        end = start + CHUNK
        while data[end] & 0xC0 == 0x80 and end > start + CHUNK - 4:  # inside of a character
            end -= 1
        backwards = data[start:end].decode()[::-1]
        if place := _BEFORE_SPACE.search(backwards) or _BEFORE_MARK.search(backwards):
            end -= len(backwards[: place.end()].encode())
        yield data[start:end]
        start = end
    data[start:].decode()
    yield data[start:]


def blank(pieces: Texts) -> bool:
    return all(not piece.strip() or piece.decode().isspace() for piece in pieces)


def pieces(value: object) -> Texts:
    """A string, or bytes of UTF-8, in pieces."""
    data = value if isinstance(value, bytes) else utf8(value)
    try:
        found = (data,) if len(data) <= CHUNK and data.decode() is not None else tuple(chunks(data))
    except UnicodeDecodeError:
        raise Reject("invalid_utf8") from None
    if b"\0" in data:
        raise Reject("nul")
    return found


def utf8(value: object) -> bytes:
    """The bytes of a string; bytes as they are."""
    if value is None:
        raise Reject("missing_field")
    if isinstance(value, str):
        if "\0" in value:
            raise Reject("nul")
        try:
            value = value.encode()
        except UnicodeEncodeError:
            raise Reject("lone_surrogate") from None
    if not isinstance(value, bytes):
        raise Reject("wrong_type")
    return value


def text_of(row: Mapping[str, Any], columns: Sequence[str]) -> Texts:
    """The text of a row's columns, `doc.text` being the field `text` of `doc`, in pieces.

    A blank line stands between the texts of several columns, and of a list; what is null or empty is left out.
    """
    if len(columns) == 1 and isinstance(text := row.get(columns[0]), (bytes, str)):  # as most are
        return pieces(text)
    found: list[bytes] = []
    for column in columns:
        value = _field(row, column)
        found += map(utf8, value if isinstance(value, (list, tuple)) else () if value is None else (value,))
    if len(found) > 1:
        found = [b"\n\n".join(text for text in found if text.strip())]
    return pieces(found[0] if found else None)


def _field(row: Mapping[str, Any], path: str) -> Any:
    """What is under a key, or else under `a` and in it under `b` for `a.b`; `None` where there is nothing."""
    if path in row or "." not in path:
        return row.get(path)
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
