"""`verify_shards.py` passes a sound build and names whatever was damaged."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chimera.cli import UserError
from chimera.commands import build_shards, verify_shards
from chimera.convert.verify.block_rules import BlockRules, ChatRules, TemplateRules
from chimera.convert.verify.root import Root
from chimera.manifest import parse_manifest
from chimera.mds import ShardFormat, file_of, index_bytes, write_shard
from chimera.objects import Objects
from tests.convert.builds import ROOT
from tests.convert.s3_server import S3Server
from tests.convert.small_tokenizer import ADDED, with_added

BLOCK = 32
RULES = BlockRules(vocab_size=100, eos_id=0, pad_id=1, special=frozenset({0, 1, 2, 3}))
CHAT = BlockRules(100, 0, 1, frozenset({0, 1, 2, 3}), ChatRules(start_id=2, end_id=3, header=(7, 8)))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of three streams, one of each packing."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "tokenizer.json").write_text(json.dumps(with_added(*ADDED)))
    texts = [f"Il gatto {i} dorme sotto l'albero numero {i}. " * (1 + i % 7) for i in range(120)]
    rows = [{"text": text} for text in texts] + [{"text": None}, {"text": "x"}]
    pairs = [{"instruction": f"Quanto fa {i}?", "output": f"Fa {i + 1}. " * (1 + i % 5)} for i in range(80)]
    for name, content in (("text", rows), ("chat", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    streams = [("joined", "text", "concat"), ("alone", "text", "none"), ("talk", "chatml", "best_fit")]
    config = {
        "output": str(folder / "out"),
        "tokenizer": {"path": str(folder)},
        "block_len": BLOCK,
        "hash": "xxh3_64",
        "shard_bytes": 8192,
        "eval_fraction": 0.1,
        "workers": 1,
        "streams": {
            name: {
                "format": kind,
                "packing": packing,
                "sources": [{"files": [str(folder / f"{'chat' if kind == 'chatml' else 'text'}.jsonl")]}],
            }
            for name, kind, packing in streams
        },
    }
    (folder / "shards.yaml").write_text(json.dumps(config))
    assert build_shards.main([str(folder / "shards.yaml")]) == 0
    return folder / "out"


@pytest.fixture
def build(sound: Path, tmp_path: Path) -> Path:
    """A copy of the build to damage."""
    return Path(shutil.copytree(sound, tmp_path / "out"))


def bad(build: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What the tool prints about the build."""
    code = verify_shards.main([str(build)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bad: ")]
    assert code == (1 if lines else 0)
    return lines


def test_a_sound_build_passes(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_shards.main([str(sound)]) == 0
    out, err = capsys.readouterr()
    assert "3 streams" in out
    assert "talk/train begins: <|im_start|>user Quanto fa" in err


def shard(build: Path, stream: str) -> Path:
    return sorted((build / stream / "train").glob("*.zstd"))[-1]


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "what"), [(flip_a_bit, "xxh3_64 is"), (cut_off, "bytes, the index"), (Path.unlink, "read")]
)
def test_a_damaged_shard_is_named(
    build: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], what: str
) -> None:
    file = shard(build, "joined")
    damage(file)
    lines = bad(build, capsys)
    assert f"joined/train/{file.name}" in lines[0]
    assert what in lines[0]
    assert all("joined" in line for line in lines)  # the counts that follow from it, and no other stream


def test_a_bad_root_is_bad_though_nobody_reads_what_is_wrong(build: Path) -> None:
    flip_a_bit(shard(build, "joined"))
    command = f"{sys.executable} convert/verify_shards.py {build} | head -0; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, check=False).returncode == 1


def test_a_remote_build_is_read_from_its_store(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with S3Server(tmp_path / "s3") as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        shutil.copytree(sound, server.root / "bucket" / "out")
        server.errors = 2
        assert verify_shards.main(["s3://bucket/out/"]) == 0
        missing, damaged = (f"{name}/train/{shard(sound, name).name}" for name in ("talk", "alone"))
        store = Objects("s3://bucket/out", 2)
        store.delete(missing)
        store.put(damaged, bytes((sound / damaged).stat().st_size))
        assert verify_shards.main(["s3://bucket/out"]) == 1
        lines = capsys.readouterr().out
        assert f"bad: {missing}: there is no such object" in lines
        assert f"bad: {damaged}: xxh3_64 is" in lines
        with pytest.raises(UserError, match=r"s3://bucket/elsewhere: no readable manifest\.json"):
            verify_shards.main(["s3://bucket/elsewhere"])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("joined/train/index.json", "SHA-256"),
        ("tokenizer/tokenizer.json", "not the tokenizer of the manifest"),
        ("rejects/joined.jsonl.zst", "rejects/joined.jsonl.zst"),
    ],
)
def test_other_damaged_files_are_named(
    build: Path, capsys: pytest.CaptureFixture[str], file: str, message: str
) -> None:
    flip_a_bit(build / file)
    assert message in bad(build, capsys)[0]


def edit_manifest(build: Path, change: Callable[[Any], None]) -> None:
    manifest = json.loads((build / "manifest.json").read_text())
    change(manifest)
    manifest.pop("sha256", None)
    (build / "manifest.json").write_text(json.dumps(manifest))


def edit_index(build: Path, change: Callable[[Any], None]) -> None:
    """Change an index, and its hash in the manifest."""
    file = build / "joined" / "train" / "index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    edit_manifest(build, lambda manifest: manifest["streams"]["joined"]["train"].update(index=digest))


def test_any_damage_to_the_rejects_is_named(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = build / "rejects" / "joined.jsonl.zst"
    good = file.read_bytes()
    for at in range(6, len(good), 7):  # behind the frame's header
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert any("rejects/joined.jsonl.zst" in line for line in bad(build, capsys)), at
    for name, end in (("joined", len(good) - 1), ("talk", 0)):  # of the second nothing was rejected
        file.write_bytes(good)
        (build / "rejects" / f"{name}.jsonl.zst").write_bytes(good[:end])
        assert any(f"rejects/{name}.jsonl.zst: damaged" in line for line in bad(build, capsys))


@pytest.mark.parametrize("stray", ["joined/train/shard.99999.00000.mds", "talk/eval/notes.txt", "gone/eval/index.json"])
def test_a_file_that_is_not_of_the_build_is_named(build: Path, capsys: pytest.CaptureFixture[str], stray: str) -> None:
    (build / stray).parent.mkdir(parents=True, exist_ok=True)
    (build / stray).write_text("{}")
    (build / "talk" / "train" / "shard.00000.00000.mds").write_text("as a reader of streaming's leaves it")
    assert bad(build, capsys) == [f"bad: {stray}: not of this build"]


@pytest.mark.parametrize("key", ["blocks", "tokens", "padding", "documents", "shards"])
def test_each_count_is_checked(build: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    def change(manifest: Any) -> None:
        manifest["streams"]["talk"]["train"][key] += 1

    edit_manifest(build, change)
    assert any(f"talk/train: {key}: found" in line for line in bad(build, capsys))


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [("vocab_size", 9999, "vocab_size"), ("eos_token", "<|endofmind|>", "eos_id"), ("pad_token", " ", "pad_id")],
)
def test_what_is_said_of_the_tokenizer_is_checked(
    build: Path, capsys: pytest.CaptureFixture[str], key: str, value: object, problem: str
) -> None:
    edit_manifest(build, lambda manifest: manifest["tokenizer"].update({key: value}))
    assert any(line.startswith(f"bad: tokenizer: {problem}: found") for line in bad(build, capsys))


def test_rows_must_add_up(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(manifest: Any) -> None:
        manifest["streams"]["joined"]["rows"]["filtered"]["too_short"] += 1
        manifest["streams"]["alone"]["rows"]["rejected"]["nul"] = 1

    edit_manifest(build, change)
    lines = "\n".join(bad(build, capsys))
    assert "joined: rows read: found 123, the manifest says 122" in lines
    assert "rejects/alone.jsonl.zst: holds {'missing_field': 1}" in lines


def rewrite(build: Path, stream: str, tokens: np.ndarray, masks: np.ndarray | None) -> None:
    """Replace a train split by one sound shard of the given blocks, with index and manifest to match."""
    folder = build / stream / "train"
    shutil.rmtree(folder)
    folder.mkdir()
    form = ShardFormat(BLOCK, "uint16", masks is not None, "zstd:3", "xxh3_64", 8192)
    index = index_bytes([write_shard(form, folder, "shard.00000", tokens, masks)])
    (folder / "index.json").write_bytes(index)

    def change(manifest: Any) -> None:
        manifest["streams"][stream]["train"]["index"] = hashlib.sha256(index).hexdigest()

    edit_manifest(build, change)


def test_wrong_tokens_under_right_hashes_are_found(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = np.full((3, BLOCK), 50)
    tokens[1, 3] = 60_000
    tokens[2, 5] = 2  # <|im_start|> in plain text
    rewrite(build, "joined", tokens, None)
    lines = "\n".join(bad(build, capsys))
    assert "joined/train/shard.00000.mds.zstd: block 1 has an id outside of the vocabulary" in lines
    assert "block 2 has a special token that no document may hold" in lines
    assert "joined: largest token id: found 60000" in lines


def test_a_record_table_that_lies_is_found(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(manifest: Any) -> None:
        manifest["block_len"] = manifest["settings"]["block_len"] = 16

    edit_manifest(build, change)
    assert "its column_encodings is ['ndarray:uint16:32'] in the index where" in bad(build, capsys)[0]


@pytest.mark.parametrize(
    ("key", "value"), [("column_encodings", ["ndarray:int16:32"]), ("compression", "zstd:9"), ("hashes", [])]
)
def test_an_index_that_describes_other_shards_is_found(
    build: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any
) -> None:
    """Under a right hash: whoever reads the shards goes by these words."""
    edit_index(build, lambda index: index["shards"][0].update({key: value}))
    assert f"its {key} is {value} in the index where" in bad(build, capsys)[0]


def test_index_names_are_not_paths(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_index(build, lambda index: file_of(index["shards"][0]).update(basename="../../manifest.json"))
    assert "is not a file name" in bad(build, capsys)[0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"blocks"', '"blocs"'),
        ('"uint16"', '"uint56"'),
        ('"eos_id": 0', '"eos_id": -1'),
        ('"joined"', '"join"'),
        ('"describe": {', '"describe": {"texts": 3, '),
        ('"block_len": 32', '"block_len": 64'),
    ],
)
def test_a_damaged_manifest_is_one_line(build: Path, old: str, new: str) -> None:
    value = json.loads((build / "manifest.json").read_text())
    del value["sha256"]  # or that alone would show it
    manifest = json.dumps(value, indent=1, sort_keys=True)
    assert old in manifest
    (build / "manifest.json").write_text(manifest.replace(old, new, 1))
    with pytest.raises(UserError, match=r"no readable manifest\.json"):
        verify_shards.main([str(build)])


def test_a_manifest_is_written_as_it_was_read_and_unknown_keys_are_ignored(build: Path) -> None:
    data = (build / "manifest.json").read_bytes()
    assert parse_manifest(data).as_bytes() == data
    edit_manifest(build, lambda manifest: manifest["streams"]["talk"]["train"].update(later=1) or manifest.update(b=2))
    assert parse_manifest((build / "manifest.json").read_bytes()).as_bytes() == data


@pytest.mark.parametrize(
    "content", [None, "{", '{"format": 2, "streams": {}}', '{"format": 1, "streams": {"../x": {}}}']
)
def test_without_a_manifest_there_is_nothing_to_verify(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"no readable manifest\.json"):
        verify_shards.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ([5, 6, 0, 7], None),
        ([5, 0, 1, 1], None),
        ([5, 6, 7, 100], "outside of the vocabulary"),
        ([1, 1, 1, 1], "no token but padding"),
        ([5, 0, 1, 6], "padding before a token"),
        ([5, 6, 1, 1], "does not follow the end of a document"),
        ([5, 2, 6, 0], "special token"),
    ],
)
def test_rules_of_text_blocks(block: list[int], message: str | None) -> None:
    good = [5, 0, 6, 0]
    found = list(RULES.broken(np.array([good, block], dtype=np.uint16), None))
    assert len(found) == (message is not None)
    if message is not None:
        assert message in found[0]
        assert found[0].startswith("block 1 ")


NOT_SAID, PART = "is not what the assistant says", "over a part of what the assistant says"


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        # 2 begins a message, 3 ends it; 7, 8 are the assistant's header
        ([2, 5, 3, 9, 2, 7, 8, 6, 6, 3, 0], "00000001110", None),
        ([2, 5, 3, 9, 2, 7, 8, 6, 6, 3, 0], "00000000000", NOT_SAID),
        ([2, 5, 3, 9, 2, 7, 8, 6, 6, 3, 0], "00000001111", NOT_SAID),
        ([2, 5, 3, 9, 2, 7, 8, 6, 6, 3, 0], "00000001100", NOT_SAID),
        ([2, 5, 3, 9, 2, 7, 8, 6, 6, 3, 0], "00000000110", NOT_SAID),
        ([2, 5, 3, 9, 2, 7, 8, 6, 6, 3, 0], "00000011110", NOT_SAID),
        ([2, 7, 5, 6, 3, 0], "000110", NOT_SAID),  # not the assistant's header
        ([2, 7, 5, 6, 3, 0], "000000", None),
        # the rest of a message, by whomever
        ([6, 6, 6, 3, 0, 1], "000000", None),
        ([6, 6, 6, 3, 0, 1], "111100", None),
        ([8, 6, 6, 3, 0, 1], "011100", None),
        ([6, 6, 6, 3, 0, 1], "111000", PART),
        ([6, 6, 6, 3, 0, 1], "110100", PART),
        ([6, 6, 6, 3, 0, 1], "000100", PART),
        ([6, 6, 6, 3, 0, 1], "111110", NOT_SAID),
        ([0, 2, 5, 3, 0, 1], "100000", NOT_SAID),
        ([6, 6, 6, 6, 6, 6], "111111", None),
        ([2, 7], "00", None),
        # the same behind the end of another document
        ([6, 3, 0, 6, 6, 3, 0], "0001110", None),
        ([6, 3, 0, 8, 6, 3, 0], "1100110", None),
        ([6, 3, 0, 6, 6, 3, 0], "0001100", PART),
        ([6, 3, 0, 6, 6, 6, 6], "0000001", PART),
        ([6, 3, 0, 6, 6, 3, 0], "0010000", NOT_SAID),
        ([6, 3, 0, 6, 0, 1, 1], "0000001", NOT_SAID),
    ],
)
def test_rules_of_masks(tokens: list[int], mask: str, message: str | None) -> None:
    found = list(CHAT.broken(np.array([tokens], dtype=np.uint16), np.array([[c == "1" for c in mask]])))
    assert len(found) == (message is not None), found
    assert message is None or message in found[0]


def test_a_mask_that_is_lost_under_right_hashes_is_found(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Root(str(build))
    index = json.loads((build / "talk/train/index.json").read_text())
    form = ShardFormat(BLOCK, "uint16", True, "zstd:3", "xxh3_64", 8192)
    read = (verify_shards.read_shard(root, "talk/train", shard, form) for shard in index["shards"])
    tokens, masks = map(np.concatenate, zip(*read, strict=True))
    rewrite(build, "talk", tokens, masks)
    assert not any("mask" in line for line in bad(build, capsys))
    rewrite(build, "talk", tokens, np.zeros_like(masks))
    assert any("an assistant mask that is not what the assistant says" in line for line in bad(build, capsys))


@pytest.mark.parametrize(
    ("whole", "rests", "masks", "fault"),
    [
        (True, False, "0011000110", None),
        (True, False, "0000000110", "nothing is learned"),  # of the first of two
        (True, True, "0011000000", "nothing is learned"),  # of the second
        (False, False, "0000000110", None),  # the first may be the rest of a longer one
        (False, False, "0011000000", "nothing is learned"),
        (False, True, "0011000000", None),  # the second may be the rest of a longer one
        (False, True, "0010000110", "does not end where an answer does"),
    ],
)
def test_masks_of_a_template_end_where_answers_do(whole: bool, rests: bool, masks: str, fault: str | None) -> None:
    """Two conversations in a block and its padding; 3 ends an answer, 0 a conversation, which may be learned."""
    rules = BlockRules(100, 0, 1, frozenset(), TemplateRules(frozenset({0, 3}), whole, rests), rests=rests)
    tokens = np.array([[9, 8, 7, 3, 0, 9, 8, 7, 0, 1]])
    found = list(rules.broken(tokens, np.array([[bit == "1" for bit in masks]])))
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]
