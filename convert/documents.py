"""Row → document: the text or conversation one row holds, or why it is dropped.

A document is a tuple of pieces: a `str` is encoded as plain text, an `int` is a special token's id. Special
tokens only ever enter as ids, so text that merely looks like one stays text.

A row is *rejected* when it is broken (kept aside with its reason) and *filtered* when it is sound but not wanted.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from chimera.cli import UserError

if TYPE_CHECKING:
    from convert.settings import StreamSettings

Piece = str | int

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Document:
    """`assistant` has one flag a piece (conversations) or is empty (plain text)."""

    pieces: tuple[Piece, ...]
    assistant: tuple[bool, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """The pieces that are text; together they are the document's content."""
        return tuple(piece for piece in self.pieces if isinstance(piece, str))

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts))


@dataclass(frozen=True)
class Dropped:
    kind: Literal["filtered", "rejected"]
    reason: str


class _Reject(Exception):
    """Raised inside this module with the reason; `read` turns it into `Dropped`."""


def parse_line(line: str) -> dict[str, Any] | Dropped:
    """One JSONL line (without a byte-order mark) as an object."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # bad JSON, an integer of thousands of digits, absurd nesting
        return Dropped("rejected", "unparseable")
    return value if isinstance(value, dict) else Dropped("rejected", "not_an_object")


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
        text = _string(row, self.column)
        if len(text) < self.min_chars:
            return Dropped("filtered", "too_short")
        return Document((text,))

    def _conversation(self, row: Mapping[str, Any]) -> Document | Dropped:
        messages = _messages(row) if row.get("messages") is not None else _instruction(row)
        messages = [m for m in messages if m[0] != "system" or m[1].strip()]
        if not any(role == "assistant" for role, _ in messages):
            return Dropped("filtered", "no_answer")
        if not all(content.strip() for _, content in messages):
            return Dropped("filtered", "empty_message")
        return render(messages, self._start, self._end)


def render(messages: list[tuple[str, str]], start: int, end: int) -> Document:
    """ChatML: `<|im_start|>ROLE\\nCONTENT<|im_end|>` for each (role, content), joined with a newline.

    The header `ROLE\\n` is a piece of its own, so that a prompt that ends with `<|im_start|>assistant\\n` gets
    the same ids at inference. The assistant says its content and the closing `<|im_end|>`.
    """
    pieces: list[Piece] = []
    assistant: list[bool] = []
    for role, content in messages:
        said = role == "assistant"
        if pieces:
            pieces.append("\n")
            assistant.append(False)
        pieces += [start, f"{role}\n", content, end]
        assistant += [False, False, said, said]
    return Document(tuple(pieces), tuple(assistant))


def _instruction(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`{instruction, input, output}`; `input` may be missing, null or empty, else it follows on a new line."""
    question, answer = _string(row, "instruction"), _string(row, "output")
    if row.get("input") is not None:
        given = _string(row, "input")
        question = f"{question}\n{given}" if given.strip() else question
    return [("user", question), ("assistant", answer)]


def _messages(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`{messages: [{role, content}, ...]}`."""
    messages = row["messages"]
    if not isinstance(messages, (list, tuple)) or not all(isinstance(m, Mapping) for m in messages):
        raise _Reject("wrong_type")
    pairs = [(_string(m, "role"), _string(m, "content")) for m in messages]
    if not all(role in ROLES for role, _ in pairs):
        raise _Reject("unknown_role")
    return pairs


def _string(row: Mapping[str, Any], key: str) -> str:
    """The text under `key`; a binary column is read as UTF-8."""
    value = row.get(key)
    if value is None:
        raise _Reject("missing_field")
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise _Reject("invalid_utf8") from None
    if not isinstance(value, str):
        raise _Reject("wrong_type")
    if "\0" in value:
        raise _Reject("nul")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise _Reject("lone_surrogate") from None
    return value
