"""Control tokens of a chat: which a rendering holds, and how contents that look like them stay text.

Only a template may write a control token. In contents each string that reads as one, and each half that could become
one with what the template puts beside it, is broken with a noncharacter (`BROKEN`) before rendering. What is found
whole in the rendering is then the template's; the marks are taken out of the text between.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

BROKEN, SEEN = "\ufdd0", "\ufdd1"  # of the four that no content may hold
RESERVED = re.compile("[\ufdd0-\ufdd3]")
# White space as Rust's `\s` has it, which `lstrip` and `rstrip` of an added token swallow.
WHITE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


class GoesOn(bytes):
    """A text that goes on with the one before it: it takes no prefix space."""


@dataclass(frozen=True)
class ControlToken:
    id: int
    lstrip: bool = False
    rstrip: bool = False


class Found(NamedTuple):
    """A control token of a rendering, by its place there."""

    start: int
    end: int
    token: str


class Segment(NamedTuple):
    """A piece of a rendering as it is stored, by where it begins there: an id, or a text."""

    start: int
    piece: bytes | int


class ControlTokens:
    """The control tokens of one stream. `prefix` says where the tokenizer puts a space before a text (`joints.py`)."""

    def __init__(self, tokens: Mapping[str, ControlToken], prefix: str = "none") -> None:
        self.tokens, self.prefix = dict(tokens), prefix
        self._find = _pattern(self.tokens)
        self._longest = max(map(len, self.tokens), default=0)
        self._starts = {token[:n] for token in self.tokens for n in range(1, len(token))}
        self._ends = {token[n:] for token in self.tokens for n in range(1, len(token))}
        self._all = "\0".join(self.tokens)
        self._last = {start[-1] for start in self._starts}
        self._first = {end[0] for end in self._ends}

    def find(self, text: str, start: int = 0) -> list[Found]:
        """Every control token in a text, the longest at each place, as `tokenizers` finds them."""
        return [Found(*match.span(), match[0]) for match in self._find.finditer(text, start)]

    def break_text(self, text: str, inside: bool = True) -> str:
        """A content with marks wherever it could read as a control token; `inside`: also as the middle of one."""
        while self._find.search(text):
            text = self._find.sub(lambda match: match[0][0] + BROKEN + match[0][1:], text)
        said = text.strip()
        if not said:
            return text
        sizes = range(1, min(self._longest, len(said) + 1))
        within = inside and len(said) < self._longest and said in self._all
        if within or (said[-1] in self._last and any(said[-n:] in self._starts for n in sizes)):
            at = len(text.rstrip())
            text = text[:at] + BROKEN + text[at:]
        if within or (said[0] in self._first and any(said[:n] in self._ends for n in sizes)):
            at = len(text) - len(text.lstrip())
            text = text[:at] + BROKEN + text[at:]
        return text

    def break_value(self, value: Any) -> Any:
        """The same for all texts of a tool or its call, the names of keys among them."""
        return over_texts(value, lambda text: self.break_text(text, inside=False))

    def segments(self, text: str, found: Sequence[Found], cuts: Iterable[int]) -> Iterator[Segment]:
        """A rendering as it is stored: control tokens (`found`, in order) by id, the text between them as it is.

        `cuts` are places where generation begins: the prompt before one is encoded apart. Swallowed white space ends
        there. A text that follows another, or has no prefix where it stands, is `GoesOn`.
        """
        bounds = sorted({0, *cuts, len(text), *(place for one in found for place in one[:2])})
        tokens = {one.start: one for one in found}
        before: ControlToken | None = None
        text_before, swallow = False, False
        for start, end in pairwise(bounds):
            if start in tokens:
                before = self.tokens[tokens[start].token]
                yield Segment(start, before.id)
                swallow, text_before = before.rstrip, False
                continue
            piece = text[start:end]
            if swallow:
                piece = piece.lstrip(WHITE)
                swallow = False
            if end in tokens and self.tokens[tokens[end].token].lstrip:
                piece = piece.rstrip(WHITE)
            if piece:
                on = text_before or (self.prefix == "first" and before is not None)
                yield Segment(start, (GoesOn if on else bytes)(piece.encode()))
                text_before = True

    @cached_property
    def ids(self) -> frozenset[int]:
        return frozenset(token.id for token in self.tokens.values())


def found_in(marked: str, found: Sequence[Found]) -> tuple[str, list[Found]]:
    """A marked rendering without its marks, and the places of its control tokens there."""
    if not RESERVED.search(marked):
        return marked, list(found)
    marks = [match.start() for match in RESERVED.finditer(marked)]
    moved, passed = [], 0
    for one in found:
        while passed < len(marks) and marks[passed] < one.start:
            passed += 1
        moved.append(Found(one.start - passed, one.end - passed, one.token))
    return RESERVED.sub("", marked), moved


def over_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A value of JSON with each of its texts changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {over_texts(key, change): over_texts(item, change) for key, item in value.items()}
    return [over_texts(item, change) for item in value] if isinstance(value, list) else value


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Any of the tokens, the longest first; grouped by their first character, so that most places need one look."""
    groups: dict[str, list[str]] = {}
    for token in sorted(tokens, key=lambda token: (-len(token), token)):
        groups.setdefault(token[0], []).append(re.escape(token[1:]))
    return re.compile("|".join(f"{re.escape(first)}(?:{'|'.join(rest)})" for first, rest in groups.items()) or "(?!)")
