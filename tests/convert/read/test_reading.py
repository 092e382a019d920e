"""Rows of local files: the same ones however a file is cut, and from wherever reading starts again."""

import gzip
import itertools
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from chimera.cli import UserError
from chimera.convert.read import columns, parquet, reading
from chimera.convert.read.parsing import Dropped
from chimera.convert.read.readers import rows_of_file
from chimera.convert.read.reading import Position, Span
from tests.convert.builds import LIMITS

LINES = st.lists(
    st.sampled_from([b'{"text": "a"}', b"", b"\r", b"broken", b'{"text": "' + b"x" * 60 + b'"}\r', b" ", b"[1]"]),
    max_size=30,
)


START = Position()


def read(span: Span, start: Position = START) -> list[tuple[object, object, int]]:
    return [(row.value, row.raw, row.after.number) for row in rows_of_file(span, "text", start, LIMITS)]


@settings(deadline=None)
@given(LINES, st.booleans(), st.booleans(), st.integers(1, 9))
def test_any_cut_of_a_jsonl_file_gives_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], bom: bool, newline_at_end: bool, ranges: int
) -> None:
    body = (b"\xef\xbb\xbf" if bom else b"") + b"\n".join(lines) + (b"\n" if newline_at_end and lines else b"")
    file = tmp_path_factory.mktemp("cut") / "a.jsonl"
    file.write_bytes(body)
    whole = read(Span("file", str(file), 0, None, len(body)))
    cuts = [len(body) * i // ranges for i in range(ranges + 1)]
    found = [read(Span("file", str(file), a, b, b - a)) for a, b in itertools.pairwise(cuts) if b > a]
    assert [row[:2] for rows in found for row in rows] == [row[:2] for row in whole]
    assert len(whole) == len(body.split(b"\n")) - (not body or body.endswith(b"\n"))


def test_blank_lines_hold_nothing_and_bad_utf8_costs_one_line(tmp_path: Path) -> None:
    surrogate = b'{"text": "\xed\xa0\x80"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([b"", b" \t\r", b'{"text": "\xff"}', surrogate, b'{"text": "a"}']))
    rejected = Dropped("rejected", "invalid_utf8")
    rows = list(rows_of_file(Span("file", str(tmp_path / "a.jsonl"), 0, None, 9), "text", START, LIMITS))
    assert [row.value for row in rows] == [None, None, rejected, rejected, {"text": "a"}]
    assert [row.raw for row in rows[2:4]] == [b'{"text": "\xff"}', surrogate]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_reading_starts_again_behind_any_row(tmp_path: Path, suffix: str) -> None:
    body = b"".join(b'{"text": "%d"}\n' % i + b"\n" * (i % 3) for i in range(40))
    pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[suffix]
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(pack(body))
    span = Span("file", str(file), 0, None, file.stat().st_size)
    rows = list(rows_of_file(span, "text", Position(), LIMITS))
    assert sum(row.size for row in rows) == pytest.approx(span.bytes, rel=0.5)
    for i, row in enumerate(rows):
        assert read(span, row.after) == [(r.value, r.raw, r.after.number) for r in rows[i + 1 :]]


def test_parquet_starts_again_behind_any_row_and_one_bad_text_costs_one_row(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [b"text %d" % i for i in range(50)]
    texts[17] = b"\xff broken"
    column = pa.array(texts, pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": column, "other": list(range(50))}), tmp_path / "a.parquet", row_group_size=20)
    span = Span("file", str(tmp_path / "a.parquet"), 0, None, 1000)
    rows = list(rows_of_file(span, "text", Position(), LIMITS))
    assert [row.value for row in rows] == [{"text": text} for text in texts]  # bytes: the reader decodes row by row
    assert [row.number for row in rows] == list(range(50))
    for i, row in enumerate(rows):
        assert read(span, row.after) == [(r.value, r.raw, r.after.number) for r in rows[i + 1 :]]
    second = Span("file", str(tmp_path / "a.parquet"), 1, 2, 400)
    assert [row.number for row in rows_of_file(second, "text", Position(), LIMITS)] == list(range(20, 40))


def test_equal_large_values_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet stores them once, so that their row group looks small; large ones may also follow on small ones."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(parquet, "LARGE_BATCH", 1 << 20)
    seen: list[int] = []
    real = parquet.columns_as_rows
    monkeypatch.setattr(parquet, "columns_as_rows", lambda batch: (seen.append(batch.nbytes), real(batch))[1])
    texts = ["small"] * 100 + ["x" * 100_000] * 200
    for name, column in (("a", texts[100:]), ("b", texts)):
        seen.clear()
        pq.write_table(pa.table({"text": column}), tmp_path / f"{name}.parquet")
        span = Span("file", str(tmp_path / f"{name}.parquet"), 0, None, 1000)
        rows = list(rows_of_file(span, "text", Position(), LIMITS))
        assert [row.value for row in rows] == [{"text": text.encode()} for text in column]
        assert sum(size > 1_200_000 for size in seen) <= 1
        assert max(seen) < 64 * 110_000


def test_a_row_too_long_for_memory_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(columns, "LONGEST_LINE", 100)
    monkeypatch.setattr(columns, "SMALL_BATCH", 100)
    said = [[{"role": "user", "content": "a" * length}] for length in (50, 60, 500, 70)]
    for name, column in (("text", ["a" * 60, "b" * 101, "", "c" * 90, "d" * 3000]), ("messages", said)):
        pq.write_table(pa.table({name: column}), tmp_path / f"{name}.parquet")
        span = Span("file", str(tmp_path / f"{name}.parquet"), 0, None, 1000)
        rows = list(rows_of_file(span, "text" if name == "text" else None, Position(), LIMITS))
        long = [row.number for row in rows if row.value == Dropped("rejected", "row_too_long")]
        assert long == ([1, 4] if name == "text" else [2])
        assert [row.number for row in rows] == list(range(len(column)))


def test_a_line_too_long_for_memory_is_rejected_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LONGEST_LINE", 100)
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n' + b"x" * 5000 + b'\n{"text": "b"}\n')
    rows = read(Span("file", str(file), 0, None, 1))
    assert rows == [
        ({"text": "a"}, b'{"text": "a"}', 1),
        (Dropped("rejected", "line_too_long"), None, 2),
        ({"text": "b"}, b'{"text": "b"}', 3),
    ]


def test_a_zstd_window_above_128_mb_has_its_own_remedy(tmp_path: Path) -> None:
    line = b'{"text": "a"}\n'
    window = bytes([(28 - 10) << 3])  # 2^28 bytes; then one raw block, the last
    (tmp_path / "a.jsonl.zst").write_bytes(
        b"\x28\xb5\x2f\xfd\0" + window + (1 | len(line) << 3).to_bytes(3, "little") + line
    )
    with pytest.raises(UserError, match="its zstd window is above 128 MB: compress it again without --long"):
        read(Span("file", str(tmp_path / "a.jsonl.zst"), 0, None, 1))
