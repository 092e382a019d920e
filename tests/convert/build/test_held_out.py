"""Validation sets of a stream's own: built beside its training rows, compared with them, never mixed into them."""

from pathlib import Path
from typing import Any

import pytest

from chimera.cli import UserError
from chimera.commands.verify_shards import verify_shards
from tests.convert import builds

SHARED, HELD = 5, 30  # documents of the validation set that training rows hold too, and all of it


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Texts and conversations to train on, and validation sets of which the first rows are among them."""
    long = [builds.text(builds.random.Random(seed), 80) for seed in range(200)]
    held = long[:SHARED] + [builds.text(builds.random.Random(1000 + seed), 80) for seed in range(HELD - SHARED)]
    talks = builds.chats(3, 100)
    held_talks = talks[:SHARED] + builds.chats(4, HELD - SHARED)
    for name, rows in {"texts": long, "held-texts": held}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(builds.jsonl({"text": text} for text in rows))
    (tmp_path / "talks.jsonl").write_bytes(builds.jsonl(talks))
    (tmp_path / "held-talks.jsonl").write_bytes(builds.jsonl(held_talks) + b"broken\n")
    return tmp_path


def config(files: Path, output: Path, overlap: str = "keep", **changes: Any) -> dict[str, Any]:
    def stream(name: str, **more: Any) -> dict[str, Any]:
        sources = {"sources": [{"files": [f"{files}/{name}.jsonl"]}]}
        return {**sources, "eval_sources": [{"files": [f"{files}/held-{name}.jsonl"]}], "eval_overlap": overlap, **more}

    chat = {"format": "chatml", "packing": "best_fit"}
    streams = {"texts": stream("texts"), "talks": stream("talks", **chat), "alone": stream("texts", sources=[])}
    streams["alone"].pop("eval_overlap")
    return builds.config(files, output, streams={**streams, **changes})


@pytest.mark.parametrize("overlap", ["keep", "remove"])
def test_a_stream_has_a_validation_set_of_its_own(files: Path, tmp_path: Path, overlap: str) -> None:
    manifest = builds.build_here(config(files, tmp_path / "out", overlap))
    verify_shards(tmp_path / "out")
    for name, rows in (("texts", 200), ("talks", 100)):
        stream = manifest["streams"][name]
        removed = SHARED if overlap == "remove" else 0
        assert stream["train"]["documents"] == rows - removed, "eval_fraction leaves it alone"
        assert stream["eval"]["documents"] == HELD
        assert stream["rows"]["filtered"] == ({"in_eval_sources": removed} if removed else {})
        assert stream.get("overlap") == (None if removed else {"rows": SHARED})
        assert stream["eval_source"]["describe"]["files"][0]["path"].endswith(f"held-{name}.jsonl")
    assert manifest["streams"]["talks"]["rows"]["rejected"] == {"unparseable": 1}
    alone = manifest["streams"]["alone"]
    assert (alone["train"]["documents"], alone["eval"]["documents"]) == (0, HELD)
    tokens = manifest["streams"]["texts"]["eval"]["tokens"]
    assert alone["eval"]["tokens"] == tokens


def test_the_bytes_are_the_same_after_stops_and_with_workers_in_any_order(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"part_bytes": 4000, "eval_fraction": 0.2}
    builds.build_here({**config(files, tmp_path / "out"), **small})
    once = builds.tree(tmp_path / "out")
    builds.build_here(
        {**config(files, tmp_path / "other"), **small}, lambda work: builds.Inline(work, slots=3, last_first=True)
    )
    assert builds.tree(tmp_path / "other") == once
    _, stops = builds.build_with_stops({**config(files, tmp_path / "stopped"), **small}, monkeypatch, rows=9, every=7)
    assert stops > 3
    assert builds.tree(tmp_path / "stopped") == once


def test_a_limit_on_training_tokens_leaves_the_validation_set_whole(files: Path, tmp_path: Path) -> None:
    limited = config(files, tmp_path / "out")
    limited["streams"]["texts"]["max_tokens"] = 3000
    stream = builds.build_here(limited)["streams"]["texts"]
    assert 3000 <= stream["train"]["tokens"] < 4000
    assert stream["eval"]["documents"] == HELD


def test_a_validation_set_that_changes_is_noticed(files: Path, tmp_path: Path) -> None:
    settings = config(files, tmp_path / "out")
    settings["streams"]["texts"]["eval_sources"] = [{"files": [f"{files}/held-t*.jsonl"]}]
    builds.build_here(settings)
    before = builds.tree(tmp_path / "out")
    builds.build_here(settings)
    assert builds.tree(tmp_path / "out") == before
    (files / "held-too.jsonl").write_bytes(builds.jsonl([{"text": "a" * 99}]))
    with pytest.raises(UserError, match=r"streams\.texts\.eval_sources has \S+/held-too\.jsonl now"):
        builds.build_here(settings)
