"""A whole build: what the shards hold, what the manifest says, and when a build is refused."""

import fcntl
import io
import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from chimera.cli import UserError
from chimera.convert.encode.document import Document
from chimera.convert.encode.encoding import Encoder
from chimera.convert.read.reading import Span
from chimera.convert.read.sources import _group
from chimera.convert.settings import TokenizerSettings
from tests.convert import builds


def stored_blocks(output: Path, stream: str, split: str) -> np.ndarray:
    """All blocks of a split in index order, read by the format's definition."""
    blocks = []
    for entry in json.loads((output / stream / split / "index.json").read_bytes())["shards"]:
        data = zstandard.decompress((output / stream / split / entry["zip_data"]["basename"]).read_bytes())
        count, start = np.frombuffer(data, "<u4", 2)
        assert len(data) == entry["raw_data"]["bytes"]
        assert count == entry["samples"]
        records = np.frombuffer(data, np.uint8, offset=int(start)).reshape(count, -1)
        assert [entry["column_names"][-1], entry["column_encodings"][-1]] == ["tokens", "ndarray:uint16:64"]
        blocks.append(records[:, -128:].copy().view("<u2"))
    return np.concatenate(blocks)


def documents_of(blocks: np.ndarray, encoder: Encoder) -> list[list[int]]:
    """The documents in concatenated blocks, without EOS and padding."""
    tokens = blocks.reshape(-1)
    tokens = tokens[tokens != encoder.pad_id]
    ends = np.flatnonzero(tokens == encoder.eos_id)
    assert ends[-1] == len(tokens) - 1
    return [part[:-1].tolist() for part in np.split(tokens, ends + 1)[:-1]]


def test_shards_hold_every_document_in_order_once(sources: Path, tmp_path: Path) -> None:
    manifest = builds.build_here(builds.config(sources, tmp_path / "out"))
    encoder = Encoder.from_settings(TokenizerSettings(path=str(builds.tokenizer())))
    wanted = [t for seed in (20, 21, 22, 23) for t in builds.texts(seed, {20: 150, 21: 80}.get(seed, 40))]
    ids = [ids[:-1].tolist() for ids, _ in encoder.encode([Document((t.encode(),)) for t in wanted if len(t) >= 50])]
    found = {
        split: documents_of(stored_blocks(tmp_path / "out", "lines", split), encoder) for split in ("train", "eval")
    }
    in_train = {tuple(document) for document in found["train"]}
    assert found["train"] == [d for d in ids if tuple(d) in in_train]
    assert found["eval"] == [d for d in ids if tuple(d) not in in_train]
    lines = manifest["streams"]["lines"]
    assert lines["rows"] == {
        "read": len(wanted) + 1,
        "documents": len(ids),
        "filtered": {"too_short": len(wanted) - len(ids)},
        "rejected": {"unparseable": 1},
    }
    assert lines["train"]["documents"] + lines["eval"]["documents"] == len(ids)
    assert not (tmp_path / "out" / ".work").exists()
    assert manifest["streams"]["chats"]["train"]["blocks"] > 0


def test_max_tokens_ends_behind_the_document_that_reaches_it(sources: Path, tmp_path: Path) -> None:
    manifest = builds.build_here(builds.config(sources, tmp_path / "out"))
    encoder = Encoder.from_settings(TokenizerSettings(path=str(builds.tokenizer())))
    train = manifest["streams"]["limited"]["train"]
    blocks = stored_blocks(tmp_path / "out", "limited", "train")
    last = documents_of(blocks, encoder)[-1]
    assert train["tokens"] - len(last) - 1 < 9000 <= train["tokens"]
    assert train["tokens"] == int((blocks != encoder.pad_id).sum())


def test_max_tokens_does_not_depend_on_which_part_ends_first(sources: Path, tmp_path: Path) -> None:
    settings = builds.config(sources, tmp_path / "out", part_bytes=4000)
    settings["streams"] = {"limited": settings["streams"]["limited"]}
    builds.build_here(settings)
    for slots in (3, 50):
        back = partial(builds.Inline, slots=slots, last_first=True)
        builds.build_here({**settings, "output": str(tmp_path / f"back{slots}")}, back)
        assert builds.tree(tmp_path / f"back{slots}") == builds.tree(tmp_path / "out")


def test_a_source_that_ends_before_max_tokens_is_said(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = builds.config(sources, tmp_path / "out")
    settings["streams"] = {"columns": {**settings["streams"]["columns"], "max_tokens": 10**9}}
    train = builds.build_here(settings)["streams"]["columns"]["train"]
    said = f"; to train on: {train['tokens']} tokens in {train['blocks']} blocks, all there are (max_tokens: {10**9})"
    assert said in capsys.readouterr().err


BAD_LINES = {
    3: ("unparseable", b'{"text": "cut off'),
    4: ("not_an_object", b"[1, 2]"),
    5: ("missing_field", b'{"txt": "a"}'),
    6: ("wrong_type", b'{"text": 12}'),
    7: ("invalid_utf8", b'{"text": "\xff\xfe broken"}'),
    9: ("lone_surrogate", b'{"text": "half \\ud83d of a pair, long enough to be taken for a text otherwise"}'),
    10: ("nul", b'{"text": "a nul \\u0000 inside of a text that is long enough otherwise"}'),
}


def test_each_bad_line_is_kept_with_its_line_and_reason(tmp_path: Path) -> None:
    good = [json.dumps({"text": t}).encode() for t in builds.texts(1, 60) if len(t) > 50]
    lines = {2: good[0], 8: b"", **{number: raw for number, (_, raw) in BAD_LINES.items()}}
    body = (
        b"\xef\xbb\xbf" + b"\r\n".join(lines.get(number, good[number % len(good)]) for number in range(1, 41)) + b"\r\n"
    )
    body += b"nonsense\n" + good[1]  # the last line has no newline
    (tmp_path / "in.jsonl").write_bytes(body)
    settings = builds.config(tmp_path, tmp_path / "out", part_bytes=2000)
    settings["streams"] = {"s": {"sources": [{"files": [f"{tmp_path}/in.jsonl"]}]}}
    manifest = builds.build_here(settings)
    packed = (tmp_path / "out" / "rejects" / "s.jsonl.zst").read_bytes()
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed)) as reader:
        rejects = [json.loads(line) for line in reader.read().splitlines()]
    expected = {**BAD_LINES, 41: ("unparseable", b"nonsense")}
    assert [(r["line"], r["reason"]) for r in rejects] == [(n, reason) for n, (reason, _) in expected.items()]
    assert [r["raw"].encode("utf-8", "surrogateescape") for r in rejects] == [raw for _, raw in expected.values()]
    assert {r["file"] for r in rejects} == {f"{tmp_path}/in.jsonl"}
    rows = manifest["streams"]["s"]["rows"]
    assert rows["read"] == 41
    assert rows["documents"] == 41 - len(expected)
    assert rows["rejected"] == {reason: sum(r["reason"] == reason for r in rejects) for reason, _ in expected.values()}


def test_a_finished_build_is_left_alone(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = builds.config(sources, tmp_path / "out")
    builds.build_here(settings)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    builds.build_here(settings)
    assert capsys.readouterr().err.startswith(f"{tmp_path}/out is finished: nothing to do (its indexes, proofs and ")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_other_settings_are_refused_with_the_difference_and_rebuild_replaces(sources: Path, tmp_path: Path) -> None:
    settings = builds.config(sources, tmp_path / "out")
    builds.build_here(settings)
    other = builds.config(sources, tmp_path / "out", block_len=32)
    other["streams"].pop("chats")
    with pytest.raises(UserError, match="block_len: 64 -> 32"):
        builds.build_here(other)
    builds.build_here({**other, "rebuild": True})
    builds.build_here({**other, "output": str(tmp_path / "fresh")})
    assert builds.tree(tmp_path / "out") == builds.tree(tmp_path / "fresh")


def test_another_tokenizer_or_a_changed_file_is_refused(tmp_path: Path) -> None:
    builds.write_sources(tmp_path / "in")
    settings = builds.config(tmp_path / "in", tmp_path / "out")
    builds.build_here(settings)
    spec = json.loads((builds.tokenizer() / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec, indent=7))
    with pytest.raises(UserError, match="tokenizer: "):
        builds.build_here({**settings, "tokenizer": {"path": str(tmp_path)}})
    with open(tmp_path / "in" / "plain.jsonl", "ab") as file:
        file.write(b"{}\n")
    with pytest.raises(UserError, match=r"the size of .*plain\.jsonl"):
        builds.build_here(settings)


def test_a_folder_that_is_not_ours_is_refused(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "lines").mkdir(parents=True)
    with pytest.raises(UserError, match="is not of this build"):
        builds.build_here(builds.config(sources, tmp_path / "out"))


def test_a_second_builder_of_one_output_is_refused(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / ".work").mkdir(parents=True)
    with open(tmp_path / "out" / ".work" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another builder is writing"):
            builds.build_here(builds.config(sources, tmp_path / "out"))


def test_the_first_source_that_opens_is_used_and_the_others_named(sources: Path, tmp_path: Path) -> None:
    settings = builds.config(sources, tmp_path / "out")
    there = settings["streams"]["columns"]["sources"][0]
    settings["streams"] = {"s": {"sources": [{"files": ["/nowhere/x.jsonl"]}, there]}}
    source = builds.build_here(settings)["streams"]["s"]["source"]
    assert source["index"] == 1
    assert source["passed_over"] == [{"source": "/nowhere/x.jsonl", "reason": "no file at /nowhere/x.jsonl"}]
    settings["streams"]["s"]["sources"].pop()
    with pytest.raises(UserError, match=r"streams\.s: no source opens: /nowhere/x\.jsonl: no file at"):
        builds.build_here({**settings, "output": str(tmp_path / "none")})
    settings["streams"]["s"]["sources"] = [{"files": [f"{sources}/"]}]
    globs = f"in which `{sources}/\\*.jsonl` \\(2 files\\), `{sources}/\\*.parquet` \\(2 files\\), .* would match"
    with pytest.raises(UserError, match=f"no file at {sources}/; it is a folder, {globs}"):
        builds.build_here({**settings, "output": str(tmp_path / "none")})
    assert not (tmp_path / "none").exists()


def test_a_stream_without_a_document_is_refused_with_the_reasons(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = builds.config(sources, tmp_path / "out")
    settings["streams"] = {"s": {"sources": [{"files": [f"{sources}/plain.jsonl"]}], "min_chars": 100_000}}
    said = r"streams\.s: no document .* 151 rows \(150 too_short, 1 unparseable\).*rejected rows, with reasons, are in "
    with pytest.raises(UserError, match=said + r".*/parts-\w+/s/\d+/rejects\.jsonl\)"):
        builds.build_here(settings)
    said = capsys.readouterr().err
    assert re.search(
        r"streams\.s: warning: none of the first \d+ rows of its source is a document \(\d+ too_short", said
    )
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ({"column": "txt"}, r"none of the first \d+ rows .* holds text under `txt` \(\d+ missing_field; the last has "),
        ({"format": "chatml"}, r"holds a conversation \(\d+ missing_field; the last has "),
    ],
)
def test_a_wrong_column_or_format_is_found_before_the_source_is_read(
    sources: Path, tmp_path: Path, stream: dict[str, str], message: str
) -> None:
    settings = builds.config(sources, tmp_path / "out")
    source = {"files": [f"{sources}/plain.jsonl"]} | ({"column": stream["column"]} if "column" in stream else {})
    settings["streams"] = {"s": {"sources": [source], "format": stream.get("format", "text")}}
    with pytest.raises(UserError, match=message):
        builds.build_here(settings)
    assert not any((tmp_path / "out").glob("*"))


def test_a_tokenizer_that_prefixes_texts_is_refused_for_conversations_alone(sources: Path, tmp_path: Path) -> None:
    spec = json.loads((builds.tokenizer() / "tokenizer.json").read_bytes())
    spec["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    settings = builds.config(sources, tmp_path / "out", tokenizer={"path": str(tmp_path)})
    with pytest.raises(UserError, match=r"streams.chats: `format: chatml` .* without prefix"):
        builds.build_here(settings)
    del settings["streams"]["chats"]
    assert builds.build_here(settings)["streams"]["lines"]["train"]["blocks"] > 0


def test_a_file_that_a_pattern_finds_later_is_named(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(sources / "plain.jsonl", tmp_path / "in" / "a.jsonl")
    settings = builds.config(sources, tmp_path / "out")
    # one file, reached in two ways
    files = [f"{tmp_path}/in/*.jsonl", f"{tmp_path}/in/../in/a.jsonl"]
    settings["streams"] = {"s": {"sources": [{"files": files}]}}
    builds.build_here(settings)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["streams"]["s"]["rows"]["read"] == 151
    builds.build_here(settings)  # nothing to do
    shutil.copy(sources / "plain.jsonl", tmp_path / "in" / "b.jsonl")
    with pytest.raises(UserError, match=r"\(streams\.s has .*/in/b\.jsonl now, which can be a stream of its own\)"):
        builds.build_here(settings)
    shutil.rmtree(tmp_path / "in")
    builds.build_here(settings)  # the sources may go once all is built


@pytest.mark.parametrize("quarters", [0, 3])
@pytest.mark.parametrize("name", ["packed.jsonl.gz", "packed.jsonl.zst"])
def test_a_cut_off_file_stops_the_build_by_name(sources: Path, tmp_path: Path, name: str, quarters: int) -> None:
    data = (sources / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * quarters // 4])
    settings = builds.config(sources, tmp_path / "out")
    settings["streams"] = {"s": {"sources": [{"files": [str(tmp_path / name)]}]}}
    with pytest.raises(UserError, match=f"{name} cannot be read to its end"):
        builds.build_here(settings)
    assert not (tmp_path / "out" / "manifest.json").exists()


@given(st.lists(st.integers(0, 50), max_size=200), st.integers(50, 300))
def test_parts_hold_every_span_in_order_and_are_about_equal(sizes, part_bytes):
    spans = [Span("file", f"{i // 3}.parquet", i, i + 1, size) for i, size in enumerate(sizes)]
    parts = [[(s.file, s.begin, s.end, s.bytes) for s in part.spans] for part in _group(spans, part_bytes)]
    held = [(file, group) for part in parts for file, begin, end, _ in part for group in range(begin, end)]
    assert held == [(span.file, span.begin) for span in spans]
    weights = [sum(size for *_, size in part) for part in parts]
    assert sum(weights) == sum(sizes)
    assert len(parts) <= max(1, -(-sum(sizes) // part_bytes))
    assert max(weights, default=0) <= part_bytes + 50
    assert max(weights, default=0) - min(weights, default=0) <= 100
