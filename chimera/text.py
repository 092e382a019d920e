"""Text for people: what of data a terminal, a log or a page may show, numbers in few characters, and the one table.

Whatever anybody else wrote (documents, names, cards, templates, answers of stores, errors of libraries) is shown
through these functions alone: `neutral` for text of several lines, `one_line` for a message, `json_text`, `html`,
`markdown` and `code`.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import groupby
from typing import Any

NONE = "–"  # in a table, where there is no value
LONGEST = 4000  # characters of a line of a message
# Control characters (C0 but for tab and line end, DEL, C1), directions of writing, what is there and not seen (but for
# the joiners that Persian, Hindi and emoji are written with), line and paragraph separators, halves of characters.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_USER = re.compile(r"""(?:(?<!sftp)(?<!oci)(:/+)[^\s/@'"]{1,1000}|(:/+)[^\s/@:'"]{0,1000}:[^\s@'"]{0,1000})@""")


def neutral(text: str) -> str:
    """`text` from anywhere, with each character that controls a terminal or misleads the eye replaced.

    Tabs and line ends stay.
    """
    return _STEERING.sub("\N{REPLACEMENT CHARACTER}", text)


def without_passwords(text: str) -> str:
    """`text` with what its addresses say of user, token and password left out."""
    return _USER.sub(lambda found: found[1] or found[2], text)


def marked(ids: Iterable[int], trained: Iterable[bool], decode: Callable[[list[int]], str], color: bool = False) -> str:
    """The text of `ids`, made `neutral`, what is trained on in green, or else within ⟦⟧."""
    begin, end = ("\x1b[32m", "\x1b[0m") if color else ("⟦", "⟧")
    runs = groupby(zip(ids, trained, strict=True), key=lambda pair: bool(pair[1]))
    pieces = [(neutral(decode([int(id_) for id_, _ in run])), on) for on, run in runs]
    return "".join(f"{begin}{piece}{end}" if on else piece for piece, on in pieces)


def html(text: object) -> str:
    """`text` from anywhere, escaped for the content or a quoted attribute of an HTML or SVG element."""
    return escape(neutral(str(text)))


def markdown(text: object) -> str:
    """`text` from anywhere, escaped for a line or a table cell of Markdown."""
    return re.sub(r"([\\`*\[\]<>|~])", r"\\\1", one_line(text).replace("&", "&amp;"))


def code(text: object) -> str:
    """`text` as code in a line of Markdown, within more backticks than it has in a row."""
    shown = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence} {shown} {fence}" if "`" in shown else f"`{shown}`"


def json_text(value: Any, **options: Any) -> str:
    """`value` as JSON with its letters as they are, but escapes for what `neutral` replaces: the same value."""
    return _STEERING.sub(lambda found: json.dumps(found[0])[1:-1], json.dumps(value, ensure_ascii=False, **options))


def one_line(message: object) -> str:
    """`message`, made `neutral`, without passwords, and with every run of whitespace made one space.

    What is longer than `LONGEST` loses its middle.
    """
    text = str(message)
    if len(text) > 4 * LONGEST:  # spares the work
        text = f"{text[: 2 * LONGEST]} {text[-2 * LONGEST :]}"
    text = neutral(without_passwords(re.sub(r"\s+", " ", text))).strip()
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


def counted(count: int, what: str) -> str:
    """`1 block`, `2 blocks`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def amount(number: float) -> str:
    """A count in three digits and a unit: 45000 → 45k, 450560000 → 451M."""
    return "".join(_scaled(number))


def size(count: float) -> str:
    """Bytes, in powers of 1000: `45 kB`, `1.25 GB`."""
    shown, unit = _scaled(count)
    return f"{shown} {unit}B"


def duration(seconds: float) -> str:
    """`2 h 05 min`, `4 min`, `12 s`."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02} min"
    return f"{int(seconds // 60)} min" if seconds >= 60 else f"{seconds:.0f} s"


def percent(share: float | None) -> str:
    """`55.21 %`."""
    return NONE if share is None else f"{100 * share:.2f} %"


def decimal(value: float | None, digits: int = 3) -> str:
    """`2.167`."""
    return NONE if value is None else f"{value:.{digits}f}"


def span(first: int, end: int) -> str:
    """Steps [first, end) as they are written: first–last."""
    return f"{first}–{end - 1}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns, text left and numbers right; the first column is text. Cells are made `one_line`.

    `heads` may be empty.
    """
    lines = [[one_line(cell) for cell in line] for line in (heads, *rows) if line]
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    below = [column[bool(heads) :] for column in columns]
    left = [not at or all(not c[:1].isdigit() and c != NONE for c in column) for at, column in enumerate(below)]
    return [
        "  ".join(
            cell.ljust(width) if at_left else cell.rjust(width)
            for cell, width, at_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in lines
    ]


def _scaled(number: float) -> tuple[str, str]:
    """Three digits of `number`, and the unit they are of."""
    number = float(f"{number:.3g}")  # first, as it may bring the next unit: 999.6 → 1k
    for unit, power in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= power:
            return f"{number / power:.3g}", unit
    return f"{number:.3g}", ""
