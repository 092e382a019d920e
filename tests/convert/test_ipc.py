"""Arrow's own files: the rows behind any position, however large their batches are."""

import io
from typing import Any

import pytest

from chimera.cli import UserError
from convert import ipc
from convert.documents import Dropped
from convert.ipc import arrow_rows, open_arrow
from tests.convert.builds import as_bytes


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


def read(file: io.BytesIO, columns: list[str], skip: int = 0) -> list[object]:
    return list(arrow_rows("a.arrow", file, open_arrow(file), columns, skip, lambda *_: None))


@pytest.mark.parametrize("form", ["stream", "file"])
@pytest.mark.parametrize(
    ("compression", "at_once"), [(None, None), ("lz4", None), ("zstd", None), (None, 0), (None, 300), (None, 1 << 20)]
)
def test_rows_from_any_position(
    form: str, compression: str | None, at_once: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = table(50)
    if at_once is not None:
        made = made.drop_columns(["kind"])
        monkeypatch.setattr(ipc, "ARROW_BYTES", 0)
        monkeypatch.setattr(ipc, "AT_ONCE", at_once)
    file = write(made, form, compression, 9)
    for skip in (0, 1, 8, 9, 10, 27, 49, 50):
        for columns in (["text"], ["messages"], ["number", "flag", "text"], made.column_names):
            assert as_bytes(read(file, columns, skip)) == as_bytes(made.slice(skip).select(columns).to_pylist())


def test_batches_that_are_not_wanted_are_not_read() -> None:
    class Counted(io.BytesIO):
        read_bytes = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            self.read_bytes += len(data)
            return data

    made = table(3000).select(["text"])
    file = Counted(write(made, "stream", None, 100).getvalue())
    assert read(file, ["text"], 2950) == read(file, ["text"])[2950:]
    file.read_bytes = 0
    assert len(read(file, ["text"], 2950)) == 50
    assert file.read_bytes < len(file.getvalue()) / 4


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_a_compressed_batch_that_is_too_large_is_refused_before_it_is_read(
    compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa

    monkeypatch.setattr(ipc, "ARROW_BYTES", 1 << 20)
    texts = ["short"] * 10 + ["a" * 500_000] * 3  # of which little is left when it is compressed
    file = write(pa.table({"text": texts}), "stream", compression, 10)
    rows = arrow_rows("a.arrow", file, open_arrow(file), ["text"], 0, lambda *_: None)
    assert [next(rows) for _ in range(10)] == [{"text": b"short"}] * 10
    with pytest.raises(UserError, match=r"a\.arrow: a record batch of 1 MiB .* \(it is compressed\): save the set"):
        next(rows)


def test_a_long_row_of_a_large_batch_is_rejected_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa

    monkeypatch.setattr(ipc, "ARROW_BYTES", 0)
    monkeypatch.setattr(ipc, "AT_ONCE", 0)
    monkeypatch.setattr(ipc, "LONGEST_LINE", 1000)
    monkeypatch.setattr(ipc, "MOST_VALUES", 20)
    said = [[{"content": "a" * size}] for size in (5, 1100, 900, 2)] + [[{"content": "b"}] * 21, None]
    rows = read(write(pa.table({"messages": said}), "stream", None, 10), ["messages"])
    reasons = {1: "row_too_long", 4: "too_many_values"}
    assert rows == [
        Dropped("rejected", reasons[i]) if i in reasons else {"messages": as_bytes(m)} for i, m in enumerate(said)
    ]


def test_a_damaged_header_is_an_error_of_its_own() -> None:
    file = write(table(20).select(["text"]), "stream", None, 5)
    open_arrow(file)
    ends = set()
    for at in range(file.tell() + 8, file.tell() + 60):
        damaged = io.BytesIO(file.getvalue())
        damaged.getbuffer()[at : at + 2] = b"\xff\x7f"
        damaged.seek(file.tell())
        try:
            ends.add(str(ipc._message(damaged) is not None))
        except ValueError as error:
            ends.add(str(error).rstrip("0123456789"))
    assert ends == {"True", "there is no header of a message at byte "}
