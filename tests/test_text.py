"""Text for people: what data may not do to a terminal or a page, numbers, and the table."""

import pytest

from chimera.cli import say
from chimera.text import NONE, amount, decimal, duration, html, neutral, percent, size, table


@pytest.mark.parametrize(
    ("number", "shown"),
    [(999.4, "999"), (999.6, "1k"), (45_000, "45k"), (450_560_000, "451M"), (999_600_000, "1G"), (3e12, "3T")],
)
def test_a_count_is_three_digits_and_a_unit(number: float, shown: str) -> None:
    assert amount(number) == shown


def test_bytes_and_durations_are_short() -> None:
    counts = [0, 999, 45_000, 999_600, 1_254_000_000]
    assert [size(count) for count in counts] == ["0 B", "999 B", "45 kB", "1 MB", "1.25 GB"]
    assert [duration(seconds) for seconds in (12.4, 299, 7_530)] == ["12 s", "4 min", "2 h 05 min"]


def test_what_steers_a_terminal_or_turns_its_writing_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    text = "a\x1b[2Jb\x9bc\td\r\u202ee\u2066"
    shown = "a\ufffd[2Jb\ufffdc\td\ufffd\ufffde\ufffd"
    assert neutral(text) == shown
    say(f"{text}\nerror: forged")
    line = shown.replace("\t", " ").replace("d\ufffd", "d ")
    assert capsys.readouterr().err == f"{line} error: forged\n"
    assert table((), [[text, "1"]]) == [f"{line}  1"]
    assert html(f'{text}<b title="') == f"{shown}&lt;b title=&quot;"


def test_a_table_has_text_left_and_numbers_right() -> None:
    rows = [("2nd", "en", percent(0.5), decimal(None)), ("first", "it", percent(None), decimal(12.5, 1))]
    assert table(("phase", "stream", "share", "loss"), rows) == [
        "phase  stream    share  loss",
        "2nd    en      50.00 %     –",
        "first  it            –  12.5",
    ]
    assert table((), rows)[1] == f"first  it        {NONE}  12.5"
