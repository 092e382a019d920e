"""Row → document: the text or conversation one row holds, or why it is dropped.

A document is a tuple of pieces: `bytes` are UTF-8 that is encoded as plain text, an `int` is a special token's id.
Special tokens only ever enter as ids, so text that merely looks like one stays text. (Bytes, since one character
beyond U+FFFF makes Python keep a whole `str` at 4 bytes a character.)

A text of more than `CHUNK` bytes becomes several pieces, so that time and memory stay linear in it whatever it holds.
Each is cut before a space between two letters or digits; where there is none, before another of `MARKS` between two
letters or digits; and where there is none of these either, anywhere. With the usual byte-level tokenizers the ids are
those of the whole text wherever there was such a place (`fastpath.same_in_pieces` says which these are); with another
tokenizer, and at a cut anywhere, each piece has its ids as a text of its own. The build names such tokenizers.

A row is *rejected* when it is broken (kept aside with its reason) and *filtered* when it is sound but not wanted.
"""

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from chimera.chatml import IM_END, IM_START
from chimera.cli import UserError

if TYPE_CHECKING:
    from convert.settings import StreamSettings

Piece = bytes | int
Texts = tuple[bytes, ...]  # one text, in order

CHUNK = 1 << 17  # bytes of UTF-8
MARKS = " \n,.、。，"
_BEFORE_SPACE, _BEFORE_MARK = (re.compile(rf"(?<=[^\W_])[{marks}](?=[^\W_])") for marks in (" ", MARKS))
LONG_LINE = 1 << 20  # bytes
MOST_VALUES = 1 << 20  # of a long line; as objects of Python they take a hundred times their bytes
_LOW_ESCAPE = re.compile(rb"\\u[dD][cC][89a-fA-F]")
_ESCAPE = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][cC][89a-fA-F][0-9a-fA-F])|.)", re.DOTALL)
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Document:
    """`assistant` has one flag a piece (conversations) or is empty (plain text)."""

    pieces: tuple[Piece, ...]
    assistant: tuple[bool, ...] = ()

    @cached_property
    def texts(self) -> Texts:
        """The pieces that are text, each of about `CHUNK` bytes at most; together they are the document's content."""
        return tuple(piece for piece in self.pieces if isinstance(piece, bytes))

    @property
    def size(self) -> int:
        """Bytes of text."""
        return sum(map(len, self.texts))


@dataclass(frozen=True)
class Dropped:
    kind: Literal["filtered", "rejected"]
    reason: str


class _Reject(Exception):
    """Raised inside this module with the reason; `read` turns it into `Dropped`."""


def parse_line(line: bytes) -> dict[str, Any] | Dropped:
    """One JSONL line (without a byte-order mark) as an object."""
    if len(line) > LONG_LINE and _values(line) > MOST_VALUES:
        return Dropped("rejected", "too_many_values")
    try:
        long = len(line) > LONG_LINE and not line.isascii()
        value = _parse_long(line) if long else json.loads(line.decode())
    except UnicodeDecodeError:
        return Dropped("rejected", "invalid_utf8")
    except (ValueError, RecursionError):  # bad JSON, an integer of thousands of digits, absurd nesting
        return Dropped("rejected", "unparseable")
    return value if isinstance(value, dict) else Dropped("rejected", "not_an_object")


def _values(line: bytes) -> int:
    """How many values of JSON a line holds at most, or a number above `MOST_VALUES`.

    There is one behind each of these marks, unless the mark is part of a text.
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
    return _restored(json.loads(line.decode("ascii", "surrogateescape")))


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


class DocumentReader:
    """Reads the rows of one stream.

    `column` is the text column of a `text` stream's source. Raises `UserError` when a `chatml` stream's
    tokenizer lacks the ChatML special tokens.
    """

    def __init__(self, settings: "StreamSettings", special_ids: Mapping[str, int], column: str = "text") -> None:
        self.min_chars = settings.min_chars or 0
        self.column = column
        self._document = self._conversation if settings.format == "chatml" else self._text
        if settings.format == "chatml":
            missing = [token for token in (IM_START, IM_END) if token not in special_ids]
            if missing:
                raise UserError(
                    f"the tokenizer has no special token {' or '.join(missing)}, which `format: chatml` needs: "
                    "add it to the tokenizer, or train one with convert/train_tokenizer.py"
                )
            self._start, self._end = special_ids[IM_START], special_ids[IM_END]

    def read(self, row: object) -> Document | Dropped:
        """The row's document, or why there is none."""
        if not isinstance(row, Mapping):
            return Dropped("rejected", "not_an_object")
        try:
            return self._document(row)
        except _Reject as reject:
            return Dropped("rejected", str(reject))

    def _text(self, row: Mapping[str, Any]) -> Document | Dropped:
        pieces = _pieces(row, self.column)
        if sum(len(piece.decode()) for piece in pieces) < self.min_chars:
            return Dropped("filtered", "too_short")
        return Document(pieces)

    def _conversation(self, row: Mapping[str, Any]) -> Document | Dropped:
        messages = _messages(row) if row.get("messages") is not None else _instruction(row)
        messages = [m for m in messages if m[0] != "system" or not _blank(m[1])]
        if not any(role == "assistant" for role, _ in messages):
            return Dropped("filtered", "no_answer")
        if any(_blank(content) for _, content in messages):
            return Dropped("filtered", "empty_message")
        return render(messages, self._start, self._end)


def render(messages: list[tuple[str, Texts]], start: int, end: int) -> Document:
    """ChatML: `<|im_start|>ROLE\\nCONTENT<|im_end|>` for each (role, content), joined with a newline.

    The assistant says its content and the closing `<|im_end|>`. Its header `ROLE\\n` is a piece of its own, as it is at
    inference, where the prompt ends with it; of other messages header and content are encoded together, as there. (So
    an answer that begins with white space may have other ids than in a prompt that has it for an earlier turn.)
    """
    pieces: list[Piece] = []
    assistant: list[bool] = []
    for role, content in messages:
        said = role == "assistant"
        if pieces:
            pieces.append(b"\n")
            assistant.append(False)
        header = f"{role}\n".encode()
        texts = (header, *content) if said else (header + content[0], *content[1:])
        pieces += [start, *texts, end]
        assistant += [False, False, *[said] * len(texts)]
    return Document(tuple(pieces), tuple(assistant))


def _instruction(row: Mapping[str, Any]) -> list[tuple[str, Texts]]:
    """`{instruction, input, output}`; `input` may be missing, null or empty, else it follows on a new line."""
    question, answer = _pieces(row, "instruction"), _pieces(row, "output")
    if row.get("input") is not None:
        given = _pieces(row, "input")
        if not _blank(given):
            question = (*question[:-1], question[-1] + b"\n" + given[0], *given[1:])
    return [("user", question), ("assistant", answer)]


def _messages(row: Mapping[str, Any]) -> list[tuple[str, Texts]]:
    """`{messages: [{role, content}, ...]}`."""
    messages = row["messages"]
    if not isinstance(messages, (list, tuple)) or not all(isinstance(m, Mapping) for m in messages):
        raise _Reject("wrong_type")
    pairs = [(b"".join(_pieces(m, "role")).decode(), _pieces(m, "content")) for m in messages]
    if not all(role in ROLES for role, _ in pairs):
        raise _Reject("unknown_role")
    return pairs


def _blank(pieces: Texts) -> bool:
    return all(not piece.strip() or piece.decode().isspace() for piece in pieces)


def _pieces(row: Mapping[str, Any], key: str) -> Texts:
    """The text under `key`, a string or bytes of UTF-8, in pieces."""
    value = row.get(key)
    if value is None:
        raise _Reject("missing_field")
    if isinstance(value, str):
        if "\0" in value:
            raise _Reject("nul")
        try:
            value = value.encode()
        except UnicodeEncodeError:
            raise _Reject("lone_surrogate") from None
    if not isinstance(value, bytes):
        raise _Reject("wrong_type")
    try:
        found = tuple(chunks(value))
    except UnicodeDecodeError:
        raise _Reject("invalid_utf8") from None
    if b"\0" in value:
        raise _Reject("nul")
    return found
