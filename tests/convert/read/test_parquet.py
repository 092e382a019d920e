"""Parquet: the rows of every kind of page are the table's, and none is passed over in silence."""

import io
import random
from pathlib import Path
from typing import Any, Literal

import pytest

from chimera.cli import UserError
from chimera.convert.read import columns, parquet
from chimera.convert.read.parsing import Dropped
from chimera.convert.read.readers import rows_of_file
from chimera.convert.read.reading import Position, Span
from tests.convert import builds
from tests.convert.builds import LIMITS, as_bytes

CHAT = ["messages", "instruction", "output"]
TOO_LONG = Dropped("rejected", "row_too_long")


def values(file: Path, column: str | None, start: int = 0) -> list[object]:
    return [row.value for row in rows_of_file(Span("file", str(file), 0, None, 1), column, Position(start), LIMITS)]


def table(rng: random.Random, rows: int) -> Any:
    """Texts, conversations and a number; nulls at every depth in some of them, many equal values in others."""
    import pyarrow as pa

    empty, same = rng.choice([0, 0.2, 1]), rng.choice([0, 0.9])

    def text(words: int = 40) -> str | None:
        said = "the same" if rng.random() < same else " ".join(rng.choices(["città", "river", "😀", "\n"], k=words))
        return None if rng.random() < empty else said

    def messages() -> Any:
        said = [{"role": "user", "content": text(rng.randrange(9))} for _ in range(rng.choice([0, 1, 5]))]
        return None if rng.random() < empty else [None if rng.random() < empty else message for message in said]

    message = pa.struct([pa.field("role", pa.string(), rng.random() < 0.5), pa.field("content", pa.large_string())])
    schema = pa.schema(
        [
            pa.field("number", pa.int64()),
            pa.field("text", rng.choice([pa.string(), pa.large_string(), pa.binary()])),
            pa.field("messages", rng.choice([pa.list_, pa.large_list])(message)),
            pa.field("instruction", pa.string(), nullable=False),
            pa.field("output", pa.string()),
        ]
    )
    made = [
        {"number": i, "text": text(), "messages": messages(), "instruction": f"{i}?", "output": text()}
        for i in range(rows)
    ]
    return pa.Table.from_pylist(made, schema)


def write(rng: random.Random, made: Any, **options: Any) -> io.BytesIO:
    """A parquet file as one of its many writers might make it."""
    import pyarrow.parquet as pq

    file = io.BytesIO()
    chosen = {
        "use_dictionary": rng.random() < 0.5,
        "data_page_version": rng.choice(["1.0", "2.0"]),
        "data_page_size": rng.choice([1, 1000, 1 << 20]),
        "dictionary_pagesize_limit": rng.choice([1, 5000, 1 << 20]),
        "write_batch_size": rng.choice([1, 7, 1024]),
        "write_page_checksum": rng.random() < 0.5,
        "use_compliant_nested_type": rng.random() < 0.5,
        "store_schema": rng.random() < 0.5,
    }
    pq.write_table(made, file, **{**chosen, **options})
    return file


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
def test_the_rows_are_the_tables_from_any_row_on(compression: str, tmp_path: Path) -> None:
    rng, file = random.Random(compression), tmp_path / "a.parquet"
    for rows in (1, 40, 1500):
        page = {"data_page_size": 1 << 20} if rows == 1 else {}  # see `test_a_row_that_arrow_does_not_give_is_noticed`
        for _ in range(3):
            made = table(rng, rows)
            file.write_bytes(write(rng, made, compression=compression, row_group_size=900, **page).getbuffer())
            for names in (["text"], CHAT):
                wanted = as_bytes(made.select(names).to_pylist())
                for start in (0, rng.randrange(rows), rows - 1):
                    found = values(file, None if names == CHAT else "text", start)
                    assert found == wanted[start:], (names, start)


@pytest.mark.parametrize("encoding", ["DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY", "PLAIN"])
def test_every_encoding_of_text_is_read(encoding: str, tmp_path: Path) -> None:
    import pyarrow as pa

    file, texts = tmp_path / "a.parquet", [f"number {i}" for i in range(3000)]
    packed = write(random.Random(2), pa.table({"text": texts}), use_dictionary=False, column_encoding=encoding)
    file.write_bytes(packed.getbuffer())
    assert values(file, "text", 7) == [{"text": text.encode()} for text in texts[7:]]


def test_row_groups_before_the_first_row_wanted_are_not_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": builds.texts(52, 90)}), file, row_group_size=30, compression=None)
    good = values(file, "text")
    chunk = pq.ParquetFile(file).metadata.row_group(1).column(0)
    begin = chunk.dictionary_page_offset
    with open(file, "r+b") as out:  # nothing of the first two can be read any more
        out.seek(4)
        out.write(bytes(begin + chunk.total_compressed_size - 4))
    assert values(file, "text", 65) == good[65:]
    with pytest.raises(UserError, match=r"a\.parquet cannot be read to its end"):
        values(file, "text", 59)


def test_a_build_rejects_bad_text_of_a_column(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [text.encode() for text in builds.texts(50, 200)]
    texts[7], texts[9] = b"\xff" * 60, b"a\0" * 60
    text = pa.array(texts, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet", row_group_size=70)
    settings = builds.config(tmp_path, tmp_path / "out")
    settings["streams"] = {"texts": {"sources": [{"files": [f"{tmp_path}/a.parquet"]}]}}
    assert builds.build_here(settings)["streams"]["texts"]["rows"]["rejected"] == {"invalid_utf8": 1, "nul": 1}


def test_columns_of_other_types_of_text_and_with_a_dot_in_their_name(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.array(["a", None, "perché", "a"])
    file = tmp_path / "a.parquet"
    kinds = {"kind": texts.dictionary_encode(), "view": texts.cast(pa.string_view()), "a.b": texts}
    pq.write_table(pa.table({**kinds, "a": texts, "kind.of": texts, "number": [1, 2, 3, 4]}), file)
    for name in kinds:
        assert as_bytes(values(file, name)) == [{name: as_bytes(text)} for text in texts.to_pylist()], name
    assert values(file, "number") == [{"number": number} for number in (1, 2, 3, 4)]


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_rows_too_long_and_of_too_many_values_are_rejected(
    use_dictionary: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa

    monkeypatch.setattr(columns, "LONGEST_LINE", 130)
    monkeypatch.setattr(columns, "MOST_VALUES", 30)
    said = [[{"role": "u", "content": text}] for text in ("a" * 60, "b" * 131, "", "c" * 90, "b" * 131, "d")]
    said += [[{"role": "u", "content": "e" * 40}] * 4, [{"role": "u", "content": ""}] * 10]
    file = tmp_path / "a.parquet"
    file.write_bytes(write(random.Random(1), pa.table({"messages": said}), use_dictionary=use_dictionary).getbuffer())
    rows = values(file, None)
    assert [i for i, row in enumerate(rows) if row == TOO_LONG] == [1, 4, 6]
    assert rows[7] == Dropped("rejected", "too_many_values")
    assert [rows[i] for i in (0, 2, 3, 5)] == [{"messages": as_bytes(said[i])} for i in (0, 2, 3, 5)]


def test_damage_is_one_line(tmp_path: Path) -> None:
    rng, file = random.Random(4), tmp_path / "a.parquet"
    ends: set[str] = set()
    for compression in ("snappy", "zstd", "none"):
        good = write(rng, table(rng, 60), compression=compression).getvalue()
        for _ in range(60):
            bad = bytearray(good)
            for at in rng.choices(range(4, len(good) * 2 // 3), k=rng.choice([1, 5])):
                bad[at] = rng.randrange(256)
            file.write_bytes(bad)
            for column in ("text", None):
                try:
                    ends.add(str(len(values(file, column))))  # what is damaged is a letter, or another column
                except UserError as error:
                    ends.add(str(error))
    assert "60" in ends
    ends.remove("60")
    assert len(ends) > 10
    starts = (f"{file} cannot be read to its end: ", f"{file}: row group 0 (0 MiB of ")
    assert all(said.startswith(starts) and "\n" not in said for said in ends), ends


def test_a_footer_that_tells_other_numbers_of_rows_is_noticed(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": builds.texts(53, 700), "other": range(700)}), file)
    good = file.read_bytes()
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    count, more = b"\xf8\x0a", b"\xfa\x0a"  # 700 and 701, as the footer writes them
    ends, at = [], good.find(count, footer)
    while at >= 0:
        file.write_bytes(good[:at] + more + good[at + 2 :])
        try:
            ends.append(str(len(values(file, "text"))))
        except UserError as error:
            ends.append(str(error).removeprefix(f"{file} cannot be read to its end: ").partition(":")[0])
        at = good.find(count, at + 2)
    told = "a column of row group 0 has 700 values for 701 rows", "a column of row group 0 has 701 values for 700 rows"
    assert set(told) <= set(ends)
    assert {end for end in ends if end not in told} == {"700"}  # of the other column, and the whole file's


def test_a_row_that_arrow_does_not_give_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow 25 passes in silence over the only row of a row group when a list of it fills the page to its limit."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    said = [[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]] * 2
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": said}), file, data_page_size=1, write_batch_size=1, row_group_size=1)
    with pytest.raises(UserError, match="of the 1 rows of row group 0 1 did not come"):
        values(file, None)
    monkeypatch.setattr(parquet, "columns_as_rows", lambda _: iter([{}]))
    pq.write_table(pa.table({"messages": said}), file)
    with pytest.raises(UserError, match="of the 2 rows of row group 0 1 did not come"):
        values(file, None)


def test_a_footer_too_large_for_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"] * 2000}), tmp_path / "a.parquet", row_group_size=2)
    settings = builds.config(tmp_path, tmp_path / "out", worker_memory="600mb")
    settings["streams"] = {"s": {"sources": [{"files": [f"{tmp_path}/a.parquet"]}]}}
    monkeypatch.setattr(parquet, "_IN_MEMORY", 2000)  # as if a thousand times as large
    with pytest.raises(
        UserError, match=r"streams\.s: .*a\.parquet: its footer of 0 MiB takes more .* than the 600 MiB"
    ):
        builds.build_here(settings)


def test_a_column_that_is_called_as_if_within_another_is_not_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    said = [[{"role": "user", "content": "right"}]]
    wrong = {"text.raw": ["wrong"], "messages.meta": [{"role": "wrong"}]}
    pq.write_table(pa.table({**wrong, "text": ["right"], "messages": said}), tmp_path / "a.parquet")
    for column, value in (("text", {"text": b"right"}), (None, {"messages": as_bytes(said[0])})):
        assert values(tmp_path / "a.parquet", column) == [value]


def test_a_column_of_the_path_of_a_structs_field_is_told_from_it(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [{"b": "wrong"}], "a.b": ["right"]}), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet", "a.b") == [{"a.b": b"right"}]


@pytest.mark.parametrize("kind", ["dictionary", "view"])
def test_of_values_that_share_their_place_a_bad_one_costs_one_row(kind: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [b"ok", b"\xff\xfe", "perché".encode()]
    text = pa.array(texts, pa.binary()).view(pa.string())
    text = text.dictionary_encode() if kind == "dictionary" else text.cast(pa.string_view())
    made = {"text": text}
    if kind == "dictionary":  # pyarrow 25 writes no lists of views
        said = pa.StructArray.from_arrays([pa.array(["user"] * 3), text], ["role", "content"])
        made["messages"] = pa.ListArray.from_arrays([0, 1, 2, 3], said)
    pq.write_table(pa.table(made), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet", "text") == [{"text": text} for text in texts]
    if "messages" in made:
        found = [{"messages": [{"role": b"user", "content": text}]} for text in texts]
        assert values(tmp_path / "a.parquet", None) == found


def test_a_row_is_as_long_as_its_own_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view's value lies beside all others, which are none of its row's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(columns, "LONGEST_LINE", 4000)
    texts = ["short", *["long" * 900] * 5, "longer" * 900, *["short"] * 20]
    pq.write_table(pa.table({"text": pa.array(texts).cast(pa.string_view())}), tmp_path / "a.parquet")
    found = [TOO_LONG if len(text) > 4000 else {"text": text.encode()} for text in texts]
    assert values(tmp_path / "a.parquet", "text") == found


def test_values_that_python_has_not_cost_what_needs_them(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    strange = {
        "late": pa.array([10**13], pa.timestamp("s")),
        "later": pa.array([2**30], pa.int32()).cast(pa.date32()),
        "long": pa.array([2**62], pa.duration("s")),
        "elsewhere": pa.array([5], pa.timestamp("us", "Nowhere/Town")),
    }
    said = pa.StructArray.from_arrays(
        [pa.array(["user"]), pa.array(["hi"]), *strange.values()], ["role", "content", *strange]
    )
    pq.write_table(pa.table({**strange, "messages": pa.ListArray.from_arrays([0, 1], said)}), tmp_path / "a.parquet")
    for name in strange:
        assert values(tmp_path / "a.parquet", name) == [Dropped("rejected", "wrong_type")]
    (found,) = values(tmp_path / "a.parquet", None)
    assert found == {"messages": [{"role": b"user", "content": b"hi", **found["messages"][0]}]}
    assert {name for name, value in found["messages"][0].items() if value is not None} >= {"role", *strange}


@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_page_that_is_not_what_its_checksum_says_is_noticed(
    tmp_path: Path, version: Literal["1.0", "2.0"], dictionary: bool
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": ["hello world"]}),
        file,
        write_page_checksum=True,
        compression="none",
        use_dictionary=dictionary,
        write_statistics=False,
        data_page_version=version,
    )
    assert values(file, "text") == [{"text": b"hello world"}]
    file.write_bytes(file.read_bytes().replace(b"hello world", b"hello World", 1))
    with pytest.raises(UserError, match=r"a\.parquet cannot be read to its end: .*CRC"):
        values(file, "text")
