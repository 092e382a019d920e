"""Outputs in a store that grow and shrink by builders with work folders of their own, some of them killed midway."""

from pathlib import Path
from typing import Any

import pytest

from chimera.cli import UserError
from chimera.commands.verify_shards import verify_shards
from chimera.convert.build import publish
from chimera.convert.build.growth import restricted
from chimera.convert.build.store_output import StoreOutput
from chimera.manifest import Manifest
from tests.convert import builds
from tests.convert.s3_server import S3Server

OUTPUT = "s3://bucket/grown"


class Killed(BaseException):
    """Stands for a kill: nothing in the builder catches it."""


def kill(*_: Any, **__: Any) -> None:
    raise Killed


@pytest.fixture(autouse=True)
def one_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHIMERA_ENCODER", "tokenizers")  # no comparison of engines


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> Any:
    """Builds `chats` and what else is named, by one of several builders; `x` holds other data for each `seed`."""
    assert s3.url
    (tmp_path / "chats.jsonl").write_bytes(builds.jsonl(builds.chats(1, 30)))

    def run(builder: str, *names: str, seed: int = 5, killed: bool = False, **changes: Any) -> dict[str, Any] | None:
        (tmp_path / f"{seed}.jsonl").write_bytes(builds.jsonl({"text": text} for text in builds.texts(seed, 60)))
        streams = {
            "chats": {"format": "chatml", "packing": "best_fit", "sources": [{"files": [f"{tmp_path}/chats.jsonl"]}]}
        }
        streams |= {name: {"sources": [{"files": [f"{tmp_path}/{seed}.jsonl"]}]} for name in names}
        settings = builds.config(tmp_path, OUTPUT, work=str(tmp_path / builder), streams=streams, **changes)
        if not killed:
            return builds.build_here(settings)
        with monkeypatch.context() as patch:
            patch.setattr(publish, "_publish_shards", kill)
            patch.setattr(StoreOutput, "clear", kill)
            with pytest.raises(Killed):
                builds.build_here(settings)
        return None

    return run


def test_a_removal_that_was_killed_takes_nothing_of_the_next_builder(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("one", "x")
    build("one", killed=True, rebuild=True)  # the manifest names x no more, its shards are there
    real = publish._publish_shards

    def meanwhile(*given: Any) -> None:
        monkeypatch.setattr(publish, "_publish_shards", real)
        with pytest.raises(UserError, match="another builder is writing x of s3://bucket/grown"):
            build("one")
        real(*given)

    monkeypatch.setattr(publish, "_publish_shards", meanwhile)
    build("two", "x", seed=6, rebuild=True)
    verify_shards(OUTPUT)


def test_a_builder_gives_up_no_claim_but_its_own(build: Any, s3: S3Server) -> None:
    build("one")
    build("one", "x", killed=True)
    build("two", "x", seed=6, killed=True, rebuild=True)
    build("one")  # nothing to do, and what it had begun is let go
    assert (s3.root / "bucket/grown/.claims/x").exists()
    with pytest.raises(UserError, match="another builder is writing x of s3://bucket/grown"):
        build("three", "x", seed=7)


def test_a_builder_that_lost_its_claim_sends_its_shards_again(build: Any) -> None:
    build("one")
    build("one", "x", killed=True)
    build("two", "x", seed=6, killed=True, rebuild=True)
    build("two")  # gives the claim up; what it sent lies where the first one's was
    build("one", "x")
    verify_shards(OUTPUT)


def test_a_manifest_says_no_more_than_of_the_streams_that_are_left(build: Any) -> None:
    whole = Manifest.model_validate(build("one", "x"))
    more = whole.model_copy(update={"format": 2, "tokenizer": whole.tokenizer.model_copy(update={"bos": [2]})})
    assert restricted(more, ["chats"]) == restricted(whole, ["chats"])
    assert restricted(more, ["x"]).tokenizer.bos == [2]


def test_a_validation_set_is_sent_beside_its_stream(tmp_path: Path, s3: S3Server) -> None:
    rows = builds.jsonl({"text": text} for text in builds.texts(8, 60))
    (tmp_path / "x.jsonl").write_bytes(rows)
    source = [{"files": [str(tmp_path / "x.jsonl")]}]
    for output in (str(tmp_path / "out"), OUTPUT):
        streams = {"x": {"sources": source, "eval_sources": source, "min_tokens": 90}}
        made = builds.build_here(builds.config(tmp_path, output, work=str(tmp_path / "work"), streams=streams))
    assert builds.tree(s3.root / "bucket/grown") == builds.tree(tmp_path / "out")
    counted = made["streams"]["x"]
    assert counted["overlap"] == {"rows": counted["train"]["documents"]}, "not what is too short to train on"
