"""Builds of conversations by a template: the same bytes in any order and after stops; a changed template is noticed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from chimera.cli import UserError
from chimera.commands import verify_shards
from chimera.convert.build import batches
from chimera.convert.build import part as part_module
from tests.convert import builds
from tests.convert.build.test_build import stored_blocks
from tests.convert.encode.chat_families import FAMILIES, Family
from tests.convert.small_tokenizer import PAD


def rows() -> list[dict[str, Any]]:
    """Conversations of one to four answers; those with reasoning have it dropped once turns follow."""
    found: list[dict[str, Any]] = []
    for i in range(60):
        turns: list[dict[str, Any]] = []
        for k in range(1 + i % 4):
            turns.append({"role": "user", "content": f"{i}.{k}?"})
            thought = "<think>penso</think>" if (i + k) % 3 == 0 else ""
            turns.append({"role": "assistant", "content": f"{thought}Il gatto {i} dorme."})
        found.append({"messages": turns})
    return found


def settings(folder: Path, output: Path, family: Family, count: int = 60, **chat: Any) -> dict[str, Any]:
    (folder / "in.jsonl").write_bytes(builds.jsonl(rows()[:count]))
    tokenizer = {"path": str(family.write(folder / "tokenizer")), "eos_token": family.eos, "pad_token": PAD}
    stream = {"format": "chat", "template": "tokenizer", "packing": "best_fit", "min_tokens": 1, **chat}
    streams = {"chat": {**stream, "sources": [{"files": [str(folder / "in.jsonl")]}]}}
    return builds.config(folder, output, part_bytes=3000, streams=streams, tokenizer=tokenizer)


@pytest.mark.parametrize("turns", ["all", "each"])
def test_any_order_of_parts_and_any_stop_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns: str
) -> None:
    chat = builds.build_here(settings(tmp_path, tmp_path / "out", FAMILIES["qwen"], turns=turns))["streams"]["chat"]
    verify_shards.verify_shards(tmp_path / "out")
    counted = {"all": {"rewritten": 30}, "each": {"each": 90}}[turns]
    assert chat["turns"] == counted
    assert chat["rows"]["documents"] == {"all": 60, "each": 150}[turns]

    class Stopped(BaseException):
        pass

    add, calls = part_module._Part._add, [0]

    def add_and_stop(part: Any, *given: Any) -> Any:
        moved, calls[0] = add(part, *given), calls[0] + 1
        if calls[0] % 3 == 0:
            part._commit()
            raise Stopped
        return moved

    monkeypatch.setattr(batches, "BATCH_ROWS", 7)
    monkeypatch.setattr(part_module._Part, "_add", add_and_stop)
    stops, again = 0, settings(tmp_path, tmp_path / "again", FAMILIES["qwen"], turns=turns)
    while not (tmp_path / "again" / "manifest.json").exists():
        try:
            builds.build_here(again, lambda work: builds.Inline(work, slots=2, last_first=True))
        except Stopped:
            stops += 1
    assert stops > 2
    assert builds.tree(tmp_path / "again") == builds.tree(tmp_path / "out")


def test_documents_longer_than_a_slice_go_on_within_their_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(tmp_path, tmp_path / "out", FAMILIES["qwen"], 8, turns="each", packing="concat")
    monkeypatch.setattr("chimera.convert.build.shard_writer.SLICE", 8)
    monkeypatch.setattr(part_module._Part, "_write_shards", _writing_and_stopping(part_module._Part._write_shards))
    stops = 0
    while not (tmp_path / "out" / "manifest.json").exists():
        try:
            builds.build_here({**given, "block_len": 8, "shard_bytes": 400})
        except _Stopped:
            stops += 1
    assert stops > 3
    monkeypatch.undo()
    builds.build_here({**given, "output": str(tmp_path / "whole"), "block_len": 8, "shard_bytes": 400})
    assert builds.tree(tmp_path / "out") == builds.tree(tmp_path / "whole")


class _Stopped(BaseException):
    pass


def _writing_and_stopping(write: Any) -> Any:
    """Write shards, and stop after some of the times that they were committed."""
    calls = [0]

    def wrapped(part: Any, rest: bool = False) -> None:
        before = sum(len(split.state.shards) for split in part.splits.values())
        write(part, rest)
        calls[0] += 1
        if not rest and sum(len(split.state.shards) for split in part.splits.values()) > before and calls[0] % 3 == 0:
            raise _Stopped

    return wrapped


def test_an_end_of_text_that_ends_the_last_answer_is_learned_and_stored_once(tmp_path: Path) -> None:
    given = settings(tmp_path, tmp_path / "out", FAMILIES["gpt_oss"], packing="none", date="2026-01-31")
    chat = builds.build_here({**given, "eval_fraction": 0})["streams"]["chat"]
    assert chat["template"]["date"] == "2026-01-31"
    blocks = stored_blocks(tmp_path / "out", "chat", "train")
    eos = next(
        token["id"]
        for token in json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())["added_tokens"]
        if token["content"] == "<|return|>"
    )
    assert np.count_nonzero(blocks == eos) == 60
    verify_shards.verify_shards(tmp_path / "out")


def test_the_sample_beside_the_shards_is_proven_again(tmp_path: Path) -> None:
    manifest = builds.build_here(settings(tmp_path, tmp_path / "out", FAMILIES["qwen"], turns="each"))
    file = tmp_path / "out" / "proof" / "chat.jsonl.zst"
    lines = [
        json.loads(line) for line in zstandard.ZstdDecompressor().decompress(file.read_bytes(), 1 << 24).splitlines()
    ]
    assert lines[0]["messages"] == rows()[0]["messages"]
    assert lines[0]["text"].startswith("<|im_start|>user\n0.0?<|im_end|>")
    assert len(lines[0]["ids"]) == len(lines[0]["mask"])
    assert hashlib.sha256(file.read_bytes()).hexdigest() == manifest["streams"]["chat"]["proof"]
    verify_shards.verify_shards(tmp_path / "out")
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"proof/chat.jsonl.zst: its SHA-256 is not the manifest's"):
        verify_shards.verify_shards(tmp_path / "out")


def test_a_sample_that_this_version_would_store_otherwise_is_named(tmp_path: Path) -> None:
    builds.build_here(settings(tmp_path, tmp_path / "out", FAMILIES["qwen"]))
    file = tmp_path / "out" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["streams"]["chat"]["template"]["texts"]["default"] += "\n."
    del manifest["sha256"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"proof/chat.jsonl.zst:1: other text and ids"):
        verify_shards.verify_shards(tmp_path / "out")


def test_another_template_is_another_build(tmp_path: Path) -> None:
    given = settings(tmp_path, tmp_path / "out", FAMILIES["qwen"])
    builds.build_here(given)
    builds.build_here(given)  # which finds it finished
    changed = Family(FAMILIES["qwen"].template + " ", *list(vars(FAMILIES["qwen"]).values())[1:])
    with pytest.raises(
        UserError, match=r"was built with other settings \(streams.chat: chat template: \w{12} -> \w{12}\)"
    ):
        builds.build_here(settings(tmp_path, tmp_path / "out", changed))


def test_a_template_file_and_chatml_by_its_two_names(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(FAMILIES["smol"].template)
    family = Family("", FAMILIES["smol"].special)
    chat = builds.build_here(settings(tmp_path, tmp_path / "file", family, template=str(tmp_path / "own.jinja")))
    assert chat["streams"]["chat"]["template"]["texts"] == {"default": FAMILIES["smol"].template}
    assert chat["settings"]["streams"]["chat"]["template"] == "file"
    verify_shards.verify_shards(tmp_path / "file")
    for name in ("chat", "chatml"):
        builds.build_here(settings(tmp_path, tmp_path / name, family, format=name, template="chatml"))
    assert builds.tree(tmp_path / "chat") == builds.tree(tmp_path / "chatml")
    with pytest.raises(UserError, match="has no template"):
        builds.build_here(settings(tmp_path, tmp_path / "none", Family("", family.special)))


def test_chatml_whose_tokens_swallow_what_is_stored_is_refused_with_the_place(tmp_path: Path) -> None:
    family = Family("", FAMILIES["smol"].special)
    given = settings(tmp_path, tmp_path / "out", family, template="chatml")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    spec = json.loads(file.read_text())
    for token in spec["added_tokens"]:
        token["rstrip"] = token["content"] == "<|im_end|>"
    file.write_text(json.dumps(spec))
    with pytest.raises(
        UserError, match=r"conversation 1 of its sample: from token \d+ on, behind .*the shards would hold"
    ):
        builds.build_here(given)
