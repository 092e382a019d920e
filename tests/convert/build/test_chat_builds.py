"""Builds of conversations: what became of each, and the same bytes for any number of workers and after a stop."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chimera.commands import verify_shards
from chimera.convert.encode.document import Document
from chimera.convert.encode.documents import DocumentReader
from chimera.convert.encode.encoding import Encoder
from chimera.convert.settings import TokenizerSettings
from chimera.convert.stream_settings import StreamSettings
from tests.convert import builds
from tests.convert.build.test_build import documents_of, stored_blocks

WORDS = [3, 9, 30, 5, 40, 12, 8]  # of the answers of the longest conversation


def rows() -> list[dict[str, Any]]:
    """Conversations of two shapes, some longer than a block of 64 tokens, with turns that are not to be learned."""
    found: list[dict[str, Any]] = []
    for i in range(60):
        turns: list[dict[str, Any]] = []
        for k, words in enumerate(WORDS[: 1 + i % len(WORDS)]):
            turns.append({"role": "user", "content": f"{i}.{k}"})
            turns.append({"role": "assistant", "content": " ".join(f"w{i}" for _ in range(words))})
            if (i + k) % 5 == 4:
                turns[-1]["weight"] = 0
        found.append({"messages": turns, "id": i})
        answer = {"from": "gpt", "value": "sì " * (i % 9 + 2)}
        found.append({"conversations": [{"from": "human", "value": f"{i}?"}, answer]})
    return found


def settings(sources: Path, output: Path, **changes: Any) -> dict[str, Any]:
    chat = {"format": "chatml", "packing": "best_fit", "min_tokens": 1, "sources": [{"files": [f"{sources}/*.jsonl"]}]}
    streams = {"chat": {**chat, **changes}}
    return builds.config(sources, output, part_bytes=12_000, streams=streams)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    (folder / "chats.jsonl").write_bytes(builds.jsonl(rows()))
    return folder


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("way", ["cut", "drop", "turns"])
def test_conversations_longer_than_a_block_are_cut_dropped_or_shortened(
    sources: Path, tmp_path: Path, way: str, packing: str
) -> None:
    chat = builds.build_here(settings(sources, tmp_path / "out", too_long=way, packing=packing))["streams"]["chat"]
    encoder = Encoder.from_settings(TokenizerSettings(path=str(builds.tokenizer())))
    reader = DocumentReader(StreamSettings(format="chatml"), encoder.special_ids)
    read = [found for row in rows() if isinstance(found := reader.read(row), Document)]
    whole = [ids[:-1].tolist() for ids, _ in encoder.encode(read)]
    long, short = [ids for ids in whole if len(ids) >= 64], [ids for ids in whole if len(ids) < 64]
    assert len(long) > 10
    verify_shards.verify_shards(tmp_path / "out")
    if way == "cut":
        assert chat["too_long"] == {"cut": len(long)}
        assert chat["rows"]["documents"] == len(whole) == 120 - chat["rows"]["filtered"]["nothing_trained"]
        return
    blocks = np.concatenate([stored_blocks(tmp_path / "out", "chat", split) for split in ("train", "eval")])
    assert (blocks[:, 0] == encoder.special_ids["<|im_start|>"]).all()
    stored = sorted(documents_of(blocks, encoder))
    if way == "drop":
        assert stored == sorted(short)
        assert chat["rows"]["filtered"]["too_long"] == len(long)
        assert "too_long" not in chat
        return
    shortened = [ids for ids in stored if ids not in short]
    assert len(shortened) == chat["too_long"]["turns"] > 0
    assert len(shortened) + chat["rows"]["filtered"].get("too_long", 0) == len(long)
    for ids in shortened:
        (of,) = [other for other in long if other[: len(ids)] == ids]
        ends = np.flatnonzero(np.array(of) == encoder.special_ids["<|im_end|>"])  # of questions and answers in turn
        fits = [end for end in ends[1::2] if end + 2 <= 64]
        assert len(ids) == fits[-1] + 1


@pytest.mark.parametrize("way", ["turns"])
def test_a_stopped_build_of_conversations_ends_in_the_same_bytes_and_counts(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    chat = builds.build_here(settings(sources, tmp_path / "out", too_long=way))["streams"]["chat"]
    assert chat["shapes"] == {"conversations": 60}
    assert chat["ignored"] == {"id": chat["rows"]["documents"] - 60}
    assert chat["turns"]["untrained"] > 10
    code, said = builds.run(settings(sources, tmp_path / "two", too_long=way), tmp_path)  # by two workers
    assert code == 0, said
    assert "chat: conversations in `conversations` and `messages`" in said
    assert f"fields passed over: {chat['ignored']['id']} id" in said
    assert builds.tree(tmp_path / "two") == builds.tree(tmp_path / "out")

    again = settings(sources, tmp_path / "again", too_long=way)
    _, stops = builds.build_with_stops(again, monkeypatch, rows=7, every=3)
    assert stops > 3
    assert builds.tree(tmp_path / "again") == builds.tree(tmp_path / "out")


def test_fields_that_bear_meaning_are_used_or_said(tmp_path: Path) -> None:
    asked, answered = {"role": "user", "content": "Che vento?"}, {"role": "assistant", "content": "La brezza di monte."}
    wrong = {"role": "assistant", "content": "Sbagliato", "weight": 0}
    lines = [
        {"messages": [asked, {**answered, "tool_calls": [{"function": {"name": "meteo"}}]}]},
        {"system": "Sei un marinaio.", "messages": [asked, answered]},
        {"instruction": "Che vento?", "output": "La brezza di valle.", "history": [["Ciao", "Salve"]]},
        {"messages": [asked, {**answered, "reasoning_content": "Penso."}]},
        {"messages": [asked, wrong, asked, answered], "id": 6, "source": "diario"},
    ]
    (tmp_path / "in.jsonl").write_bytes(builds.jsonl(lines))
    build = {**settings(tmp_path, tmp_path / "out", packing="none"), "eval_fraction": 0}
    chat = builds.build_here(build)["streams"]["chat"]
    rejected = {"unused_field:reasoning_content": 1, "unused_field:tool_calls": 1}
    assert chat["rows"] == {"read": 5, "documents": 3, "filtered": {}, "rejected": rejected}
    assert chat["ignored"] == {"id": 1, "source": 1}
    assert chat["turns"] == {"untrained": 1}
    verify_shards.verify_shards(tmp_path / "out")
