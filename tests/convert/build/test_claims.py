"""Builders that work on one output at the same time, each on streams of its own."""

import json
import os
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from chimera.cli import UserError
from chimera.commands.verify_shards import verify_shards
from chimera.convert.build import build as build_module
from chimera.convert.build import part_lock, store_output
from chimera.convert.build.claims import claimed
from chimera.convert.build.folder_output import FolderOutput
from chimera.convert.build.part_lock import lock_at
from chimera.convert.build.store import worker_store
from chimera.files import lock_file
from chimera.objects import Objects
from tests.convert import builds
from tests.convert.s3_server import S3Server

TERMS = {"settings": {"block_len": 64}, "tokenizer": "abc", "bos": [1]}
HALVES: list[Any] = ["columns,chats", ["lines", "limited"]]


@pytest.fixture(scope="module")
def whole(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """All streams, built by one builder."""
    output = tmp_path_factory.mktemp("whole") / "out"
    builds.build_here(builds.config(sources, output))
    return builds.tree(output)


def test_two_builders_one_of_them_killed_end_in_the_bytes_of_one(
    sources: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    configs = [builds.config(sources, tmp_path / "out", only=half, workers=1) for half in HALVES]
    for folder in folders:
        folder.mkdir()
    builders = [builds.start(*each) for each in zip(configs, folders, strict=True)]
    while not [*tmp_path.glob("out/.work-*/parts-*/*/*/commits.jsonl")]:
        assert builders[0].poll() is None
        time.sleep(0.01)
    os.killpg(builders[0].pid, signal.SIGKILL)
    for builder in builders:
        builder.communicate(timeout=300)
    assert builders[1].returncode == 0
    code, said = builds.run(configs[0], folders[0])
    assert (code, builds.tree(tmp_path / "out")) == (0, whole), said
    assert builds.build_here(builds.config(sources, tmp_path / "out"))["streams"].keys() == {
        "columns", "chats", "lines", "limited"
    }  # fmt: skip
    verify_shards(str(tmp_path / "out"))


def test_both_merge_their_streams_at_the_same_moment(
    sources: Path, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have seen that there is no manifest before either writes one; the server honors conditional writes."""
    together, arrived = threading.Barrier(2), []

    def meet(request: str) -> None:
        if request.startswith("PUT") and request.endswith("/manifest.json") and len(arrived) < 2:
            arrived.append(request)
            together.wait(300)

    failed: list[BaseException] = []

    def run(half: Any) -> None:
        try:
            builds.build_here(builds.config(sources, "s3://bucket/both", only=half, work=str(tmp_path / "work")))
        except BaseException as error:
            failed.append(error)
            together.abort()

    worker_store.cache_clear()
    with S3Server(tmp_path / "s3", seaweed=True) as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        server.before = meet
        builders = [threading.Thread(target=run, args=(half,)) for half in HALVES]
        for builder in builders:
            builder.start()
        for builder in builders:
            builder.join()
        assert (failed, len(arrived)) == ([], 2)
        store = Objects("s3://bucket/both")
        for entry in store.list():
            (tmp_path / "got" / entry.key).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "got" / entry.key).write_bytes(store.get(entry.key))
    assert builds.tree(tmp_path / "got") == whole


def test_a_stream_that_another_builds_is_refused_and_one_on_other_terms_too(sources: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with FolderOutput(str(output)).lock(["lines", "chats"], TERMS):
        with pytest.raises(UserError, match=r"another builder is writing chats of .*build other streams meanwhile"):
            builds.build_here(builds.config(sources, output, only=["columns", "chats"]))
        with pytest.raises(UserError, match=r"writing (lines|chats) of .* with other settings \(.*block_len"):
            builds.build_here(builds.config(sources, output, only=["columns"], block_len=128))
    assert not output.exists(), "neither has left anything"


def test_a_claim_ends_with_its_holder_and_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".claims").mkdir()
    (tmp_path / ".claims/dead").write_text(json.dumps({**TERMS, "tokenizer": "another"}))  # of a killed builder
    with claimed(tmp_path, ["a"], TERMS):
        with claimed(tmp_path, ["b"], {**TERMS, "bos": None}):  # of no texts
            assert sorted(os.listdir(tmp_path / ".claims")) == [".lock", "a", "b"]
        with pytest.raises(UserError, match="another builder is writing a "), claimed(tmp_path, ["b", "a"], TERMS):
            pass
        with pytest.raises(UserError, match="bos"), claimed(tmp_path, ["b"], {**TERMS, "bos": [2]}):
            pass
        assert sorted(os.listdir(tmp_path / ".claims")) == [".lock", "a"]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("change", ["published", "removed"])
def test_what_another_builder_changes_while_one_plans_is_not_lost(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """A stream published meanwhile stays; of one that went while the output was not claimed nobody says it is there."""
    output, real = tmp_path / "out", build_module.begin
    builds.build_here(builds.config(sources, output, only="columns"))

    def meanwhile(*given: Any) -> Any:
        plan = real(*given)
        if change == "published":
            builds.build_here(builds.config(sources, output, only=["chats"]))
        else:
            (output / "manifest.json").unlink()
        return plan

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "begin", lambda *given: (patch.undo(), meanwhile(*given))[1])
        both = {**builds.config(sources, output)}
        both["streams"] = {name: both["streams"][name] for name in ("columns", "lines")}
        if change == "published":
            assert builds.build_here(both)["streams"].keys() == {"chats", "columns", "lines"}
            verify_shards(str(output))
        else:
            with pytest.raises(UserError, match="another builder has just changed"):
                builds.build_here(both)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"only": ["nowhere"]}, "only`: there is no stream nowhere"),
        ({"only": "chats", "rebuild": True}, "leave `only`"),
    ],
)
def test_only_names_streams_of_the_config(sources: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        builds.build_here(builds.config(sources, tmp_path / "out", **changes))


def stored(sources: Path, tmp_path: Path, work: str, **changes: Any) -> dict[str, Any]:
    return builds.config(sources, "s3://bucket/out", work=str(tmp_path / work), **changes)


def test_a_builder_that_lives_on_after_a_takeover_leaves_the_objects_of_the_other(
    sources: Path, tmp_path: Path, s3: S3Server
) -> None:
    """It is taken over while it reads back what it sent, which it would send again."""
    other = stored(sources, tmp_path, "other", eval_fraction=0.3, rebuild=True)
    found: list[dict[str, str]] = []

    def take_over(request: str) -> None:
        if request.startswith("GET") and "/columns/train/shard.00000.00000" in request and not found:
            found.append({})
            builds.build_here(other)
            found.append(builds.tree(s3.root / "bucket/out"))

    s3.before = take_over
    with pytest.raises(UserError, match=r"^another builder began to write columns of s3://"):
        builds.build_here(stored(sources, tmp_path, "work"))
    assert builds.tree(s3.root / "bucket/out") == found[1]
    verify_shards("s3://bucket/out")


def test_a_builder_that_is_refused_keeps_no_claim_and_builds_the_rest_later(
    sources: Path, tmp_path: Path, s3: S3Server
) -> None:
    both = stored(sources, tmp_path, "both", only=["chats", "columns"])
    claims: list[list[str]] = []

    def refuse(request: str) -> None:
        if request.startswith("PUT") and "/columns/train/shard.00000.00000" in request and not claims:
            for _ in range(2):
                with pytest.raises(UserError, match="another builder is writing columns"):
                    builds.build_here(both)
                claims.append(os.listdir(s3.root / "bucket/out/.claims"))

    s3.before = refuse
    builds.build_here(stored(sources, tmp_path, "one", only=["columns"]))
    assert claims == [["columns"], ["columns"]]
    assert builds.build_here(both)["streams"].keys() == {"chats", "columns"}
    assert not [key for key in builds.tree(s3.root / "bucket/out") if ".claims" in key]


def test_what_others_have_published_of_an_unfinished_build_is_not_built_again(
    sources: Path, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its texts are published by others: the conversations that are left begin with nothing."""
    everything = builds.config(sources, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "publish", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            builds.build_here(everything)
    builds.build_here(builds.config(sources, tmp_path / "out", only=["columns", "lines", "limited"]))
    monkeypatch.setattr(builds.Inline, "start", _interrupt)  # its parts are done
    builds.build_here(everything)
    assert builds.tree(tmp_path / "out") == whole


def test_parts_are_forgotten_once_a_process_that_outlived_its_build_has_let_them_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, seen = tmp_path / "parts-0/columns/00000", list[bool]()
    part.mkdir(parents=True)
    with ExitStack() as held:
        assert held.enter_context(lock_file(lock_at(part), wait=False))
        monkeypatch.setattr(part_lock, "say", lambda _: (seen.append(part.exists()), held.close()))
        store_output._forget_parts(tmp_path)
    assert seen == [True]
    assert not part.exists()
    assert lock_at(part).exists(), "who waits for it waits for the same lock"


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
