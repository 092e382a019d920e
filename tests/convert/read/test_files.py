"""Files of every kind, compressed and not, whatever the case of their names; folders; columns; text files."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import resource
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard

from chimera.cli import UserError
from chimera.convert.read.reading import Position
from chimera.convert.read.sources import open_source, rows
from chimera.convert.settings import BuildSettings
from chimera.convert.stream_settings import SourceSettings, StreamSettings
from tests.convert import builds
from tests.convert.builds import LIMITS

TEXTS = [f"Il documento numero {i}, che parla di mulini,\nd'acqua e di «vento»." for i in range(6)]
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".GZ": gzip.compress,
    ".zst": zstandard.compress,
    ".zstd": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def body(kind: str, folder: Path) -> bytes:
    """A file of `TEXTS`; of text the first alone."""
    table = pa.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    if kind in (".csv", ".tsv"):
        lines = io.StringIO(newline="")
        csv.writer(lines, delimiter="\t" if kind == ".tsv" else ",").writerows([["text"], *[[text] for text in TEXTS]])
        return lines.getvalue().encode()
    if kind in (".txt", ".md"):
        return TEXTS[0].encode()
    if kind in (".jsonl", ".ndjson", ".json"):
        return json.dumps([{"text": t} for t in TEXTS]).encode() if kind == ".json" else builds.jsonl(table.to_pylist())
    file = folder / "body"
    if kind == ".parquet":
        pq.write_table(table, file)
    elif kind == ".feather":
        pyarrow.feather.write_feather(table, file)  # compressed, as pandas writes it
    else:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    data = file.read_bytes()
    file.unlink()
    return data


def texts_of(
    folder: Path, *files: str, column: Any = "text", part_bytes: int = 1 << 20, **stream: Any
) -> list[list[str]]:
    """The texts of each part of a stream of these files, read from every position once more."""
    streams = {"s": StreamSettings(sources=[SourceSettings(files=list(files), column=column)], **stream)}
    build = BuildSettings(output=str(folder / "out"), part_bytes=part_bytes, streams=streams)
    work = folder / "work"
    work.mkdir(exist_ok=True)
    opened = open_source("s", streams["s"], build, work)
    from chimera.convert.encode.documents import DocumentReader

    reader = DocumentReader(StreamSettings(min_chars=0), {}, opened.column)
    parts = []
    for part in opened.parts:
        texts = []
        for span in part.spans:
            found = list(rows(span, opened.column, Position(), LIMITS))
            for at, row in enumerate(found):
                assert [r.value for r in rows(span, opened.column, row.after, LIMITS)] == [
                    r.value for r in found[at + 1 :]
                ]
            # each of them is a document
            texts += [b"".join(reader.read(row.value).texts).decode() for row in found]  # type: ignore[union-attr]
        parts.append(texts)
    return parts


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md"])
@pytest.mark.parametrize("packed", PACK)
def test_every_kind_of_text_is_read_plain_and_compressed(tmp_path: Path, kind: str, packed: str) -> None:
    wanted = TEXTS[:1] if kind in (".txt", ".md") else TEXTS
    for name in (f"a{kind}{packed}", f"B{kind.upper()}{packed.upper()}"):
        (tmp_path / name).write_bytes(PACK[packed](body(kind, tmp_path)))
        assert texts_of(tmp_path, f"{tmp_path}/{name}") == [wanted]


@pytest.mark.parametrize("kind", [".parquet", ".arrow", ".feather"])
def test_every_kind_of_table_is_read(tmp_path: Path, kind: str) -> None:
    for name in (f"a{kind}", f"B{kind.upper()}"):
        (tmp_path / name).write_bytes(body(kind, tmp_path))
        assert texts_of(tmp_path, f"{tmp_path}/{name}") == [TEXTS]
    (tmp_path / f"a{kind}.gz").write_bytes(gzip.compress(body(kind, tmp_path)))
    with pytest.raises(UserError, match=r"no reader for this kind of file"):
        texts_of(tmp_path, f"{tmp_path}/a{kind}.gz")


def test_the_first_version_of_feather_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.feather").write_bytes(b"FEA1" + bytes(100))
    with pytest.raises(UserError, match=r"a\.feather cannot be read to its end: .*first version of Feather"):
        texts_of(tmp_path, f"{tmp_path}/a.feather")


def test_text_files_are_grouped_into_parts_by_their_bytes(tmp_path: Path) -> None:
    wanted = []
    for i in range(300):
        wanted.append(f"Testo {i:03d}.\n\n" + "parola " * (i % 40))
        (tmp_path / f"{i:03d}.txt").write_text(wanted[-1], encoding="utf-8")
    parts = texts_of(tmp_path, f"{tmp_path}/*.txt", part_bytes=4096)
    assert [text for part in parts for text in part] == wanted
    sizes = [sum(len(text.encode()) for text in part) for part in parts]
    assert len(parts) == -(-sum(map(len, wanted)) // 4096)
    assert max(sizes) < 2 * min(sizes)


def test_files_of_other_kinds_keep_their_place_between_text_files(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "d.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    (tmp_path / "c.jsonl").write_bytes(builds.jsonl([{"text": "c1"}, {"text": "c2"}]))
    (texts,) = texts_of(tmp_path, f"{tmp_path}/[a-d]*")
    assert texts == ["a.txt", "b.md", "c1", "c2", "d.txt"]


def text_build(folder: Path, output: str, **changes: Any) -> dict[str, Any]:
    streams = {"s": {"sources": [{"files": [f"{folder}/raw/**/*.txt", f"{folder}/raw/more.csv.gz"]}]}}
    return builds.config(folder, folder / output, part_bytes=8000, streams=streams, **changes)


def test_a_build_of_text_files_is_the_same_for_two_workers_and_after_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, text in enumerate(builds.texts(50, 120)):
        file = tmp_path / "raw" / f"{i % 3}" / f"{i:03d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode() if i != 7 else b"\xff no UTF-8")
    (tmp_path / "raw" / "more.csv.gz").write_bytes(gzip.compress(body(".csv", tmp_path)))
    manifest = builds.build_here(text_build(tmp_path, "out"))
    found = manifest["streams"]["s"]
    assert found["rows"]["read"] == 126
    assert found["rows"]["rejected"] == {"invalid_utf8": 1}
    texts = found["source"]["describe"]["texts"]
    assert (texts["files"], [Path(f["path"]).name for f in found["source"]["describe"]["files"]]) == (
        120,
        ["more.csv.gz"],
    )
    packed = (tmp_path / "out" / "rejects" / "s.jsonl.zst").read_bytes()
    reject = json.loads(zstandard.ZstdDecompressor().stream_reader(packed).read())
    assert reject == {"file": f"{tmp_path}/raw/1/007.txt", "row": 0, "reason": "invalid_utf8", "raw": "\udcff no UTF-8"}

    code, said = builds.run(text_build(tmp_path, "two"), tmp_path)
    assert code == 0, said
    assert builds.tree(tmp_path / "two") == builds.tree(tmp_path / "out")

    _, stops = builds.build_with_stops(text_build(tmp_path, "again"), monkeypatch, rows=5, every=3)
    assert stops > 6
    assert builds.tree(tmp_path / "again") == builds.tree(tmp_path / "out")


def test_text_files_that_change_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "raw" / f"{i}.txt").write_text(text * 3, encoding="utf-8")
    settings = builds.config(tmp_path, tmp_path / "out", eval_fraction=0)
    settings["streams"] = {"s": {"sources": [{"files": [f"{tmp_path}/raw/*.txt"]}]}}
    builds.build_here(settings)
    builds.build_here(settings)  # finished
    (tmp_path / "raw" / "6.txt").write_text("nuovo", encoding="utf-8")
    with pytest.raises(UserError, match=r"s has other text files \(7, \d+ bytes; before 6, \d+ bytes\) now, which"):
        builds.build_here(settings)
    for file in (tmp_path / "raw").iterdir():
        file.unlink()
    builds.build_here(settings)  # a finished build does not need them

    streams = {"s": StreamSettings(sources=[SourceSettings(files=[f"{tmp_path}/raw/*.txt"])])}
    for name in ("a", "b", "c"):
        (tmp_path / "raw" / f"{name}.txt").write_text("testo", encoding="utf-8")
    opened = open_source("s", streams["s"], BuildSettings(output=str(tmp_path / "o"), streams=streams), tmp_path)
    (tmp_path / "raw" / "b.txt").write_text("testo più lungo", encoding="utf-8")
    (tmp_path / "raw" / "c.txt").unlink()
    read = rows(opened.parts[0].spans[0], "text", Position(), LIMITS)
    assert next(read).value == {"text": b"testo"}
    with pytest.raises(UserError, match=r"b\.txt: it has 16 bytes, and had 5 when the build began"):
        next(read)
    with pytest.raises(UserError, match=r"c\.txt cannot be read to its end: .*No such file"):
        next(rows(opened.parts[0].spans[0], "text", Position(2), LIMITS))


def test_many_small_files_are_planned_as_one_part_in_little_memory(tmp_path: Path) -> None:
    for folder in range(3):
        (tmp_path / f"{folder}").mkdir()
        for i in range(1000):
            os.close(os.open(tmp_path / f"{folder}" / f"{i}.txt", os.O_CREAT))
    streams = {"s": StreamSettings(sources=[SourceSettings(files=[f"{tmp_path}/**/*.txt"])])}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened = open_source("s", streams["s"], BuildSettings(output=str(tmp_path / "o"), streams=streams), tmp_path)
    assert opened.describe["texts"]["files"] == 3000
    assert len(opened.parts) == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_the_folder_of_a_saved_set_is_read(tmp_path: Path) -> None:
    import datasets

    whole = datasets.Dataset.from_dict({"text": TEXTS})
    whole.save_to_disk(tmp_path / "saved", num_shards=2)
    assert texts_of(tmp_path, f"{tmp_path}/saved") == [TEXTS]
    datasets.DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(tmp_path / "splits")
    assert texts_of(tmp_path, f"{tmp_path}/splits/") == [TEXTS]
    assert texts_of(tmp_path, f"{tmp_path}/splits/test") == [TEXTS[:1]]
    datasets.DatasetDict({"a": whole, "b": whole}).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match=r"other has the splits a, b: name one, as .*/other/a"):
        texts_of(tmp_path, f"{tmp_path}/other")


def test_a_clone_of_a_hub_set_is_read_as_its_card_says(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    (clone / "data").mkdir(parents=True)
    (clone / ".gitattributes").write_text("*.parquet filter=lfs\n", encoding="utf-8")
    pq.write_table(pa.table({"text": TEXTS}), clone / "data" / "train-00000-of-00001.parquet")
    pq.write_table(pa.table({"text": ["di prova"]}), clone / "data" / "test-00000-of-00001.parquet")
    assert texts_of(tmp_path, str(clone)) == [TEXTS]
    (clone / ".gitattributes").unlink()
    (clone / "lines.txt").write_text("uno\ndue\n", encoding="utf-8")
    (clone / "README.md").write_text(
        "---\nconfigs:\n- config_name: x\n  data_files: lines.txt\n---\n", encoding="utf-8"
    )
    assert texts_of(tmp_path, str(clone)) == [["uno", "due"]]  # as `datasets` reads it
    card = "---\nconfigs:\n- {config_name: x, data_files: lines.txt}\n- {config_name: y, data_files: data/*}\n---\n"
    (clone / "README.md").write_text(card, encoding="utf-8")
    with pytest.raises(UserError, match=r"clone: a set of the hub, but .*give its files as globs"):
        texts_of(tmp_path, str(clone))


def test_what_git_has_in_place_of_a_large_file_is_no_data(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000000\n"
    for name in ("a.parquet", "a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(pointer)
        with pytest.raises(UserError, match=rf"{name}: git has only a pointer here .*git lfs pull"):
            texts_of(tmp_path, f"{tmp_path}/{name}")


def test_a_folder_says_which_globs_would_match(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "D.TXT", "sub/c.jsonl.zst", "sub/d.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    said = rf"{tmp_path}; it is a folder, in which `{tmp_path}/\*\.txt` \(2 files\), .*`{tmp_path}/\*\*/\*\.jsonl\.zst`"
    with pytest.raises(UserError, match=said):
        texts_of(tmp_path, str(tmp_path))
    (tmp_path / "sub" / "c.jsonl.zst").unlink()
    with pytest.raises(UserError, match="it is a folder without any file of a kind that is read here"):
        texts_of(tmp_path, f"{tmp_path}/sub")


NESTED = [
    {"doc": {"text": text, "lang": "it"}, "title": f"Titolo {i}", "body": [text, "Fine."]}
    for i, text in enumerate(TEXTS)
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
@pytest.mark.parametrize(
    ("column", "wanted"),
    [
        ("doc.text", TEXTS),
        ("body", [f"{text}\n\nFine." for text in TEXTS]),
        (["title", "body"], [f"Titolo {i}\n\n{text}\n\nFine." for i, text in enumerate(TEXTS)]),
        (["title", "doc.text"], [f"Titolo {i}\n\n{text}" for i, text in enumerate(TEXTS)]),
        (["title"], [f"Titolo {i}" for i in range(len(TEXTS))]),
    ],
)
def test_columns_may_be_nested_lists_and_joined(tmp_path: Path, kind: str, column: Any, wanted: list[str]) -> None:
    file, table = tmp_path / f"a.{kind}", pa.Table.from_pylist(NESTED)
    if kind == "parquet":
        pq.write_table(table, file, row_group_size=2)
    elif kind == "arrow":
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        file.write_bytes(builds.jsonl(NESTED) if kind == "jsonl" else json.dumps(NESTED).encode())
    assert texts_of(tmp_path, str(file), column=column) == [wanted]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.csv", b"", r"a\.csv has no column `text`: it has none at all \(is it empty\?\)"),
        ("a.csv", b"id,body\n1,x\n", r"a\.csv has no column `text`: set `column` to one of id, body"),
        ("a.txt", b"x", r"text files has no column `body`: set `column` to one of text"),
    ],
)
def test_a_column_that_is_not_there_is_said(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=said):
        texts_of(tmp_path, f"{tmp_path}/{name}", column="body" if name == "a.txt" else "text")
