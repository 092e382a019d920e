"""Arrow's own files: the rows after any position, in a file or a store, however large their batches are."""

import io
from pathlib import Path
from typing import Any

import pytest

from chimera.cli import UserError
from chimera.convert.read import arrow, columns
from chimera.convert.read.arrow import arrow_rows
from chimera.convert.read.parsing import Dropped
from chimera.convert.read.readers import rows_of_file
from chimera.convert.read.reading import Position, Span
from tests.convert.builds import LIMITS, as_bytes


def table(rows: int) -> Any:
    import pyarrow as pa

    said = [[{"role": "user", "content": f"{i}?"}] * (i % 3) for i in range(rows)]
    texts = [f"perché {i}" if i % 7 else None for i in range(rows)]
    kinds = pa.array([f"kind {i % 3}" for i in range(rows)]).dictionary_encode()
    message = pa.struct({"role": pa.string(), "content": pa.large_string()})
    flags = pa.array([i % 5 == 0 if i % 9 else None for i in range(rows)])
    columns = {"number": range(rows), "text": texts, "messages": pa.array(said, pa.list_(message)), "flag": flags}
    return pa.table({**columns, "kind": kinds})


def write(made: Any, form: str, compression: str | None, batch: int) -> io.BytesIO:
    import pyarrow as pa

    file, options = io.BytesIO(), pa.ipc.IpcWriteOptions(compression=compression)
    with (pa.ipc.new_stream if form == "stream" else pa.ipc.new_file)(file, made.schema, options=options) as writer:
        writer.write_table(made, max_chunksize=batch)
    return file


def read(file: Path, column: str | None, start: int = 0, stored: bool = False) -> list[object]:
    """The rows of a file, or as if it were in a store."""
    span = Span("file", str(file), 0, None, 1)
    if not stored:
        return [row.value for row in rows_of_file(span, column, Position(start), LIMITS)]
    body: Any = io.BufferedReader(io.BytesIO(file.read_bytes()))
    return [row.value for row in arrow_rows(body, span, column, Position(start), LIMITS)]


@pytest.mark.parametrize("form", ["stream", "file"])
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("at_once", [1 << 20, 300, 1])
def test_rows_from_any_position(
    form: str, compression: str | None, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrow, "SMALL_BATCH", at_once)
    made, file = table(50), tmp_path / "a.arrow"
    file.write_bytes(write(made, form, compression, 9).getbuffer())
    for start in (0, 1, 8, 9, 10, 27, 49, 50):
        for name in made.column_names:
            wanted = as_bytes(made.slice(start).select([name]).to_pylist())
            found = read(file, None if name == "messages" else name, start, stored=start % 2 == 0)
            assert as_bytes(found) == wanted, (name, start)


def test_long_rows_of_a_batch_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa

    monkeypatch.setattr(columns, "LONGEST_LINE", 1000)
    monkeypatch.setattr(columns, "MOST_VALUES", 20)
    said = [[{"content": "a" * size}] for size in (5, 1100, 900, 2)] + [[{"content": "b"}] * 21, None]
    file = tmp_path / "a.arrow"
    file.write_bytes(write(pa.table({"messages": said}), "stream", None, 10).getbuffer())
    reasons = {1: "row_too_long", 4: "too_many_values"}
    assert read(file, None) == [
        Dropped("rejected", reasons[i]) if i in reasons else {"messages": as_bytes(m)} for i, m in enumerate(said)
    ]


@pytest.mark.parametrize("form", ["stream", "file"])
def test_damage_is_one_line(form: str, tmp_path: Path) -> None:
    file = tmp_path / "a.arrow"
    good = write(table(200).select(["text"]), form, None, 50).getvalue()
    ends: set[str] = set()
    for size in (0, 5, 300, len(good) // 2, len(good) - 700):
        file.write_bytes(good[:size])
        with pytest.raises(UserError, match=r"a\.arrow cannot be read to its end: ") as found:
            read(file, "text")
        ends.add(str(found.value))
    for at in range(0, len(good) - 2, 7):
        file.write_bytes(good[:at] + b"\xff\x7f" + good[at + 2 :])
        try:
            ends.add(str(len(read(file, "text"))))
        except UserError as error:
            ends.add(str(error))
    starts = (
        "200",
        *(f"{file}{said}" for said in (" cannot be read to its end: ", " has no column `text`: ", ": a comp")),
    )
    assert [said for said in ends if not said.startswith(starts) or "\n" in said] == []


def test_a_file_cut_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a.arrow"
    file.write_bytes(write(table(200).select(["text"]), "stream", None, 50).getbuffer())
    rows = rows_of_file(Span("file", str(file), 0, None, 1), "text", Position(), LIMITS)
    next(rows)
    with open(file, "r+b") as out:
        out.truncate(100)
    with pytest.raises(UserError, match=r"a\.arrow cannot be read to its end: it has become shorter"):
        list(rows)
