"""Large parquet row groups streamed: the rows of every kind of page are the table's, what is not known is Arrow's."""

import io
import random
from pathlib import Path
from typing import Any, Literal

import pytest

from chimera.cli import UserError
from convert import columnar, page_bytes, pages, streamed
from convert.columnar import open_parquet
from convert.documents import Dropped
from convert.reading import Position, Span, rows_of_file
from convert.streamed import streamed_rows
from tests.convert import builds
from tests.convert.builds import as_bytes

TEXT, CHAT = ["text"], ["messages", "instruction", "output"]
TOO_LONG = Dropped("rejected", "row_too_long")


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


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "brotli"])
def test_streamed_rows_are_the_tables(compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(compression)
    for at_once in (0, 1000, 1 << 24):  # nothing is read whole, some pages, all
        for module in (pages, page_bytes):
            monkeypatch.setattr(module, "AT_ONCE", at_once)
        for rows in (1, 40, 1500):
            made = table(rng, rows)
            file = write(rng, made, compression=compression, row_group_size=900)
            parquet = open_parquet("in.parquet", file)
            for group in range(parquet.num_row_groups):
                count = parquet.metadata.row_group(group).num_rows
                for columns in (TEXT, CHAT):
                    wanted = as_bytes(made.slice(900 * group, count).select(columns).to_pylist())
                    for skip in (0, rng.randrange(count), count - 1):
                        found = list(streamed_rows(file, parquet, group, columns, skip, tmp_path))
                        assert found == wanted[skip:], (columns, skip)
    assert list(tmp_path.iterdir()) == []


def test_a_build_is_the_same_whoever_reads_its_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [text.encode() for text in builds.texts(50, 200)]
    texts[7], texts[9] = b"\xff" * 60, b"a\0" * 60
    said = [[{"role": "user", "content": t}, {"role": "assistant", "content": t}] for t in builds.texts(51, 200)]
    text = pa.array(texts, pa.binary()).view(pa.string())
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": text, "messages": said}), tmp_path / "in" / "a.parquet", row_group_size=70)
    settings = builds.config(tmp_path / "in", tmp_path / "arrow")
    source = {"sources": [{"files": [f"{tmp_path}/in/a.parquet"]}]}
    settings["streams"] = {"texts": source, "chats": {"format": "chatml", "packing": "best_fit", **source}}
    arrow = builds.build_here(settings)
    assert arrow["streams"]["texts"]["rows"]["rejected"] == {"invalid_utf8": 1, "nul": 1}
    monkeypatch.setattr(columnar, "ARROW_BYTES", 0)
    monkeypatch.setattr(columnar, "_rows_of_group", None)
    builds.build_here({**settings, "output": str(tmp_path / "streamed")})
    assert builds.tree(tmp_path / "streamed") == builds.tree(tmp_path / "arrow")


def test_columns_of_other_types_of_text_and_with_a_dot_in_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.array(["a", None, "perché", "a"])
    file = tmp_path / "a.parquet"
    kinds = {"kind": texts.dictionary_encode(), "view": texts.cast(pa.string_view()), "a.b": texts}
    pq.write_table(pa.table({**kinds, "a": texts, "kind.of": texts}), file)
    for limit in (columnar.ARROW_BYTES, 0):
        monkeypatch.setattr(columnar, "ARROW_BYTES", limit)
        for name in kinds:
            rows = [row.value for row in rows_of_file(Span("parquet", str(file), 0, None, 1), name, Position())]
            assert as_bytes(rows) == [{name: as_bytes(text)} for text in texts.to_pylist()], name


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_a_value_too_long_for_memory_is_passed_over(use_dictionary: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa

    for module in (pages, page_bytes):
        monkeypatch.setattr(module, "AT_ONCE", 10)
    monkeypatch.setattr(pages, "LONGEST_LINE", 100)
    monkeypatch.setattr(streamed, "LONGEST_LINE", 100)
    monkeypatch.setattr(streamed, "MOST_VALUES", 30)
    texts = ["a" * 60, "b" * 101, "", "c" * 100, "b" * 101, "d"]
    said = [[{"role": "u", "content": text}] for text in texts]
    said += [[{"role": "u", "content": "e" * 30}] * 4, [{"role": "u", "content": ""}] * 10]
    rng = random.Random(1)
    file = write(rng, pa.table({"text": texts}), use_dictionary=use_dictionary)
    rows = list(streamed_rows(file, open_parquet("in.parquet", file), 0, TEXT, 0, None))
    assert [i for i, row in enumerate(rows) if row == TOO_LONG] == [1, 4]
    assert [row for row in rows if row != TOO_LONG] == [{"text": t.encode()} for t in texts if t[:1] != "b"]
    file = write(rng, pa.table({"messages": said}), use_dictionary=use_dictionary)
    rows = list(streamed_rows(file, open_parquet("in.parquet", file), 0, ["messages"], 0, None))
    assert [i for i, row in enumerate(rows) if row == TOO_LONG] == [1, 3, 4, 6]
    assert rows[7] == Dropped("rejected", "too_many_values")
    assert rows[0] == {"messages": as_bytes(said[0])}


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("LZ4", {"compression": "lz4"}),
        ("DELTA_LENGTH_BYTE_ARRAY", {"use_dictionary": False, "column_encoding": "DELTA_LENGTH_BYTE_ARRAY"}),
        ("INT64", {}),
    ],
)
def test_what_is_not_known_is_read_by_arrow_or_refused(
    what: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa

    values = list(range(3000)) if what == "INT64" else [f"number {i}" for i in range(3000)]
    file, rng = tmp_path / "a.parquet", random.Random(2)
    file.write_bytes(
        write(rng, pa.table({"text": values}), data_page_size=1000, write_batch_size=10, **options).getbuffer()
    )
    span = Span("parquet", str(file), 0, None, 1)
    read = [row.value for row in rows_of_file(span, "text", Position(7))]
    monkeypatch.setattr(columnar, "ARROW_BYTES", 10_000)  # between a page and the row group
    assert [row.value for row in rows_of_file(span, "text", Position(7))] == read
    assert read == [{"text": as_bytes(value)} for value in values[7:]]
    monkeypatch.setattr(columnar, "ARROW_BYTES", 500)
    with pytest.raises(UserError, match=rf"a.parquet: row group 0 has pages .*\({what}\): write the file again"):
        list(rows_of_file(span, "text", Position()))


def test_snappy_of_longer_blocks_is_not_guessed() -> None:
    """One literal of 70,000 bytes, which snappy's own compressor would not write."""
    literal = bytes([62 << 2]) + (70_000 - 1).to_bytes(3, "little") + random.Random(3).randbytes(70_000)
    with pytest.raises(page_bytes.Unknown, match="beyond its blocks"):
        list(page_bytes._snappy(io.BytesIO(b"\xf0\xa2\x04" + literal), 70_000))


def test_where_a_page_is_not_known_arrow_goes_on_behind_the_last_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def blocks(stream: Any, size: int) -> Any:
        for block in real(stream, size):
            yield block
            raise page_bytes.Unknown("a block")

    real = page_bytes._snappy
    texts = [f"{i} " * 100 for i in range(400)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", data_page_size=1 << 18, use_dictionary=False)
    for module in (pages, page_bytes):
        monkeypatch.setattr(module, "AT_ONCE", 1000)
    monkeypatch.setattr(page_bytes, "_snappy", blocks)
    monkeypatch.setattr(columnar, "column_bytes", lambda *_: 1 << 40)
    rows = list(rows_of_file(Span("parquet", str(tmp_path / "a.parquet"), 0, None, 1), "text", Position(3)))
    assert [(row.number, row.value) for row in rows] == [(i, {"text": texts[i].encode()}) for i in range(3, 400)]


def test_damage_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, file = random.Random(4), tmp_path / "a.parquet"
    monkeypatch.setattr(columnar, "ARROW_BYTES", 0)
    ends: set[str] = set()
    for compression in ("snappy", "zstd", "none"):
        good = write(rng, table(rng, 60), compression=compression).getvalue()
        for _ in range(60):
            bad = bytearray(good)
            for at in rng.choices(range(4, len(good) * 2 // 3), k=rng.choice([1, 5])):
                bad[at] = rng.randrange(256)
            file.write_bytes(bad)
            for column in ("text", None):
                rows = rows_of_file(Span("parquet", str(file), 0, None, 1), column, Position())
                try:
                    ends.add(str(len(list(rows))))  # what is damaged is a letter, or a column that is not read
                except UserError as error:
                    ends.add(str(error))
    assert "60" in ends
    ends.remove("60")
    assert len(ends) > 10
    starts = (f"{file} cannot be read to its end: ", f"{file}: row group 0 has pages of ")
    assert all(said.startswith(starts) and "\n" not in said for said in ends), ends


def test_a_row_that_arrow_does_not_give_is_read_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow 25 passes in silence over the only row of a row group when a list of it fills the page to its limit."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    said = [[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]] * 2
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": said}), file, data_page_size=1, write_batch_size=1, row_group_size=1)
    for limit in (columnar.ARROW_BYTES, 0):
        monkeypatch.setattr(columnar, "ARROW_BYTES", limit)
        rows = rows_of_file(Span("parquet", str(file), 0, None, 1), None, Position())
        assert [row.value for row in rows] == [{"messages": as_bytes(messages)} for messages in said]
    monkeypatch.setattr(columnar, "ARROW_BYTES", 1 << 20)
    monkeypatch.setattr(columnar, "_rows_of_group", lambda *_: iter([{}]))
    pq.write_table(pa.table({"messages": said}), file)
    with pytest.raises(UserError, match="of the 2 rows of row group 0 1 did not come"):
        list(rows_of_file(Span("parquet", str(file), 0, None, 1), None, Position()))


def test_a_footer_too_large_for_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"] * 2000}), tmp_path / "a.parquet", row_group_size=2)
    settings = builds.config(tmp_path, tmp_path / "out")
    settings["streams"] = {"s": {"sources": [{"files": [f"{tmp_path}/a.parquet"]}]}}
    monkeypatch.setattr(columnar, "LARGEST_FOOTER", 10_000)
    with pytest.raises(UserError, match=r"streams\.s: .*a\.parquet: its footer of 0 MiB is too large"):
        builds.build_here(settings)


def test_a_column_that_is_called_as_if_within_another_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    said = [[{"role": "user", "content": "right"}]]
    wrong = {"text.raw": ["wrong"], "messages.meta": [{"role": "wrong"}]}
    pq.write_table(pa.table({**wrong, "text": ["right"], "messages": said}), tmp_path / "a.parquet")
    for limit in (columnar.ARROW_BYTES, 0):
        monkeypatch.setattr(columnar, "ARROW_BYTES", limit)
        for column, value in (("text", {"text": b"right"}), (None, {"messages": as_bytes(said[0])})):
            (row,) = rows_of_file(Span("parquet", str(tmp_path / "a.parquet"), 0, None, 1), column, Position())
            assert row.value == value


def test_a_column_of_the_path_of_a_structs_field_is_told_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [{"b": "wrong"}], "a.b": ["right"]}), tmp_path / "a.parquet")
    span = Span("parquet", str(tmp_path / "a.parquet"), 0, None, 1)
    assert [row.value for row in rows_of_file(span, "a.b", Position())] == [{"a.b": b"right"}]
    monkeypatch.setattr(columnar, "ARROW_BYTES", 0)
    with pytest.raises(UserError, match=r"cannot be read in pieces \(two columns of the path a\.b\)"):
        list(rows_of_file(span, "a.b", Position()))


@pytest.mark.parametrize("kind", ["dictionary", "view"])
def test_of_values_that_share_their_place_a_bad_one_costs_one_row(kind: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [b"ok", b"\xff\xfe", "perché".encode()]
    text = pa.array(texts, pa.binary()).view(pa.string())
    text = text.dictionary_encode() if kind == "dictionary" else text.cast(pa.string_view())
    columns = {"text": text}
    if kind == "dictionary":  # pyarrow 25 writes no lists of views
        said = pa.StructArray.from_arrays([pa.array(["user"] * 3), text], ["role", "content"])
        columns["messages"] = pa.ListArray.from_arrays([0, 1, 2, 3], said)
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    span = Span("parquet", str(tmp_path / "a.parquet"), 0, None, 1)
    assert [row.value for row in rows_of_file(span, "text", Position())] == [{"text": text} for text in texts]
    if "messages" in columns:
        assert [row.value for row in rows_of_file(span, None, Position())] == [
            {"messages": [{"role": b"user", "content": text}]} for text in texts
        ]


def test_a_row_is_as_long_as_its_own_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view's value lies beside all others, which are none of its row's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(columnar, "LONGEST_LINE", 4000)
    texts = ["short", *["long" * 900] * 5, "longer" * 900, *["short"] * 20]
    pq.write_table(pa.table({"text": pa.array(texts).cast(pa.string_view())}), tmp_path / "a.parquet")
    rows = rows_of_file(Span("parquet", str(tmp_path / "a.parquet"), 0, None, 1), "text", Position())
    assert [row.value for row in rows] == [TOO_LONG if len(text) > 4000 else {"text": text.encode()} for text in texts]


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
    span = Span("parquet", str(tmp_path / "a.parquet"), 0, None, 1)
    for name in strange:
        assert [row.value for row in rows_of_file(span, name, Position())] == [Dropped("rejected", "wrong_type")]
    (row,) = rows_of_file(span, None, Position())
    assert row.value == {"messages": [{"role": b"user", "content": b"hi"}]}


@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize(("arrow_bytes", "at_once"), [(columnar.ARROW_BYTES, 0), (0, 1 << 24), (0, 0)])
def test_a_page_that_is_not_what_its_checksum_says_is_noticed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arrow_bytes: int,
    at_once: int,
    version: Literal["1.0", "2.0"],
    dictionary: bool,
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(columnar, "ARROW_BYTES", arrow_bytes)  # 0: all is streamed
    for module in (pages, page_bytes):
        monkeypatch.setattr(module, "AT_ONCE", at_once)
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
    span = Span("parquet", str(file), 0, None, 1)
    assert [row.value for row in rows_of_file(span, "text", Position())] == [{"text": b"hello world"}]
    file.write_bytes(file.read_bytes().replace(b"hello world", b"hello World", 1))
    with pytest.raises(UserError, match=r"a\.parquet cannot be read to its end: .*CRC"):
        list(rows_of_file(span, "text", Position()))
