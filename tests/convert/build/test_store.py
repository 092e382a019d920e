"""Builds whose output is an object store: a real S3 server, also one that fails and restarts."""

import random
import shutil
import threading
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chimera import retries
from chimera.cli import UserError
from chimera.commands.verify_shards import verify_shards
from chimera.convert.build.store import worker_store
from chimera.objects import Objects
from chimera.objects_obstore import ObstoreClient
from tests.convert import builds
from tests.convert.faults import Faults, build_among
from tests.convert.s3_server import S3Server
from tests.convert.sftp_server import SftpServer

PREFIX = "projects/chimera/pretraining/2026-11/shards"


@pytest.fixture(scope="module")
def wanted(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a build into a folder holds: the objects must be the same."""
    folder = tmp_path_factory.mktemp("wanted")
    builds.build_here(settings_for(sources, folder / "out"))
    return builds.tree(folder / "out")


def settings_for(sources: Path, output: Path | str, **changes: Any) -> dict[str, Any]:
    settings = builds.config(sources, output, shard_bytes=20_000, **changes)
    settings["streams"].pop("lines")
    return settings


def remote(sources: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return settings_for(sources, f"s3://bucket/{PREFIX}", work=str(tmp_path / "work"), **changes)


def objects(server: S3Server) -> dict[str, str]:
    return builds.tree(server.root / "bucket" / PREFIX)


def test_objects_equal_a_local_build_through_errors_and_restarts(
    sources: Path, wanted: dict[str, str], tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ObstoreClient.write
    puts: list[str] = []

    def disturbed(self: ObstoreClient, path: str, source: Path | bytes) -> None:
        puts.append(path)
        if len(puts) in (2, 9):
            s3.errors = 2
        if len(puts) == 6:
            s3.stop()
            s3.start()
        real(self, path, source)

    monkeypatch.setattr(ObstoreClient, "write", disturbed)
    builds.build_here(remote(sources, tmp_path))
    assert s3.given == 4
    assert objects(s3) == wanted
    assert not (tmp_path / "work").exists()
    order = [line.partition(" ")[2].partition("?")[0] for line in s3.requests if line.startswith("PUT")]
    for stream, split in (("columns", "train"), ("chats", "eval")):
        folder = f"/bucket/{PREFIX}/{stream}/{split}"
        last_shard = max(i for i, path in enumerate(order) if path.startswith(f"{folder}/shard."))
        assert last_shard < order.index(f"{folder}/index.json")
    assert order[-1] == f"/bucket/{PREFIX}/manifest.json"


def test_a_wrong_key_is_told_as_such(
    sources: Path, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", wrong := "wrong/test+secret/of/forty/characters/40")
    with pytest.raises(UserError, match=r"1 attempt: the store refuses these credentials \(HTTP 403;") as e:
        builds.build_here(remote(sources, tmp_path))
    assert wrong not in str(e.value)
    assert not objects(s3)


def test_a_store_that_fails_in_every_way_ends_in_the_same_bytes(
    sources: Path, wanted: dict[str, str], tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "time", SimpleNamespace(sleep=lambda _: None))
    faults = Faults(random.Random(1), 3)
    build_among(faults, s3, remote(sources, tmp_path))
    assert all(faults.seen.values()), faults.seen
    assert objects(s3) == wanted


def test_a_second_builder_elsewhere_is_refused_and_may_take_over(
    sources: Path, wanted: dict[str, str], tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Objects, "put", _stop_at("columns/train/shard.00001", Objects.put))
        with pytest.raises(KeyboardInterrupt):
            builds.build_here(remote(sources, tmp_path))
    elsewhere = {**remote(sources, tmp_path), "work": str(tmp_path / "elsewhere")}
    with pytest.raises(UserError, match="another builder is writing chats of s3://bucket/"):
        builds.build_here(elsewhere)
    builds.build_here({**elsewhere, "rebuild": True})
    assert objects(s3) == wanted


def test_of_two_builders_that_begin_at_once_one_is_refused(
    sources: Path, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both see that nobody has the claim before either takes it, on a server that honors conditional creates."""
    both_looked, refused = threading.Barrier(2), threading.Event()
    looks: list[str] = []

    def meet(request: str) -> None:
        if request.startswith("GET") and "/.claims/chats" in request and len(looks) < 2:
            looks.append(request)
            both_looked.wait(120)
        elif request.startswith("PUT") and "/.claims/" not in request:
            refused.wait(120)  # nor does the one end before the other has had its answer

    refusals: list[str] = []

    def build(name: str) -> None:
        try:
            builds.build_here({**remote(sources, tmp_path), "work": str(tmp_path / name)})
        except UserError as error:
            refusals.append(str(error))
            refused.set()

    worker_store.cache_clear()
    with S3Server(tmp_path / "s3", seaweed=True) as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        server.before = meet
        builders = [threading.Thread(target=build, args=(name,)) for name in ("one", "two")]
        for builder in builders:
            builder.start()
        for builder in builders:
            builder.join()
        assert len(refusals) == 1
        assert "another builder began to write chats of s3://bucket" in refusals[0]
        store = Objects(f"s3://bucket/{PREFIX}")
        assert {e.key: sha256(store.get(e.key)).hexdigest() for e in store.list()} == wanted


def test_a_builder_whose_place_was_taken_publishes_nothing(sources: Path, tmp_path: Path, s3: S3Server) -> None:
    folder = s3.root / "bucket" / PREFIX

    def take_over(request: str) -> None:
        if request.startswith("PUT") and request.endswith("tokenizer.json"):
            (folder / ".claims/chats").write_text('{"builder": "another"}')

    s3.before = take_over
    with pytest.raises(UserError, match=r"another builder began to write chats of s3://.*, at the same time or since"):
        builds.build_here(remote(sources, tmp_path))
    assert not (folder / "manifest.json").exists()


def test_an_output_that_was_finished_since_it_was_looked_at_is_left_alone(
    sources: Path, tmp_path: Path, s3: S3Server
) -> None:
    folder = s3.root / "bucket" / PREFIX
    builds.build_here(settings_for(sources, tmp_path / "out"))

    def finish(request: str) -> None:
        if request.startswith("GET") and request.endswith(".claims/chats") and not folder.exists():
            folder.mkdir(parents=True)
            shutil.copy(tmp_path / "out/manifest.json", folder)

    s3.before = finish
    with pytest.raises(UserError, match="another builder has just changed s3://bucket/"):
        builds.build_here(remote(sources, tmp_path))
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["manifest.json"]


def test_a_builder_that_takes_its_place_back_trusts_no_object_of_the_other(
    sources: Path, wanted: dict[str, str], tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = {**remote(sources, tmp_path, eval_fraction=0.3), "work": str(tmp_path / "elsewhere")}
    for settings in (remote(sources, tmp_path), {**elsewhere, "rebuild": True}):
        with monkeypatch.context() as patch:
            patch.setattr(Objects, "put", _stop_at("columns/train/index", Objects.put))
            with pytest.raises(KeyboardInterrupt):
                builds.build_here(settings)
    with pytest.raises(UserError, match="another builder is writing chats of s3://bucket/"):
        builds.build_here(remote(sources, tmp_path))
    builds.build_here({**remote(sources, tmp_path), "rebuild": True})
    assert objects(s3) == wanted


def test_a_rebuild_over_an_unfinished_build_leaves_none_of_its_objects(
    sources: Path, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Objects, "update", _stop_at("manifest.json", Objects.update))
        with pytest.raises(KeyboardInterrupt):
            builds.build_here(remote(sources, tmp_path))
    changes = {"eval_fraction": 0.0, "part_bytes": 1 << 20}
    builds.build_here(remote(sources, tmp_path, rebuild=True, **changes))
    builds.build_here(settings_for(sources, tmp_path / "out", **changes))
    assert objects(s3) == builds.tree(tmp_path / "out")


@pytest.mark.usefixtures("s3")
def test_what_is_there_is_finished_or_refused(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = remote(sources, tmp_path)
    builds.build_here(settings)
    capsys.readouterr()
    builds.build_here(settings)
    assert "is finished: nothing to do" in capsys.readouterr().err
    Objects(settings["output"], 1).delete("manifest.json")  # now they might be anybody's shards
    with pytest.raises(UserError, match=r"/\w+/train/index\.json is not of this build"):
        builds.build_here({**settings, "work": str(tmp_path / "elsewhere")})


def _stop_at(key: str, real: Any) -> Any:
    def put(self: Objects, name: str, *given: Any) -> None:
        if name.startswith(key):
            raise KeyboardInterrupt
        real(self, name, *given)

    return put


def test_local_disk_use_stays_bounded_and_sent_shards_are_not_sent_again(
    sources: Path, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    real = Objects.put

    def watch(self: Objects, key: str, *given: Any) -> None:
        nonlocal most
        most = max(most, sum(1 for _ in (tmp_path / "work").rglob("parts-*/**/shard.*.zstd")))
        real(self, key, *given)

    settings = remote(sources, tmp_path, part_bytes=1 << 20)
    settings["streams"] = {"columns": settings["streams"]["columns"]}
    with monkeypatch.context() as patch:
        patch.setattr(Objects, "put", _stop_at("columns/train/shard.00000.00002", Objects.put))
        with pytest.raises(KeyboardInterrupt):
            builds.build_here(settings)
    before = len(s3.requests)
    monkeypatch.setattr(Objects, "put", watch)
    builds.build_here(settings)
    assert not [line for line in s3.requests[before:] if line.startswith("PUT") and "shard.00000.00001" in line]
    assert [line for line in s3.requests[before:] if line.startswith("PUT") and "shard.00000.00002" in line]
    assert 0 < most <= 4


def test_shards_of_parts_that_ran_ahead_of_max_tokens_are_removed(sources: Path, tmp_path: Path, s3: S3Server) -> None:
    settings = remote(sources, tmp_path, part_bytes=4000)
    settings["streams"] = {"limited": settings["streams"]["limited"]}
    builds.build_here({**settings, "output": str(tmp_path / "local"), "work": None})
    builds.build_here(settings, partial(builds.Inline, slots=50, last_first=True))
    assert any(line.startswith("DELETE") and "shard." in line for line in s3.requests)
    assert objects(s3) == builds.tree(tmp_path / "local")


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_is_not_there_is_one_clear_line(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"s3://no-such-bucket/x/\.claims/\w+ failed"):
        builds.build_here({**remote(sources, tmp_path), "output": "s3://no-such-bucket/x"})


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["S3", "SFTP"])
def test_chaos_kills_of_builds_into_a_store(
    kind: str, sources: Path, wanted: dict[str, str], tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.convert.build.test_crash import kill_until_done

    rng = random.Random()
    kills = rounds = 0
    with SftpServer(tmp_path / "sftp") as sftp:
        for key, value in sftp.environment.items():
            monkeypatch.setenv(key, value)
        url, root = (f"s3://bucket/{PREFIX}", s3.root / "bucket" / PREFIX) if kind == "S3" else (sftp.url, sftp.root)
        while kills < 10:
            settings = {**remote(sources, tmp_path), "output": f"{url}/{rounds}"}
            kills += kill_until_done(settings, tmp_path, rng, most=5, start=40)
            assert builds.tree(root / str(rounds)) == wanted
            rounds += 1
    print(f"\n{kind}: {kills} kills over {rounds} builds, each ended byte-identical to the build into a folder")


def test_a_finished_output_takes_more_streams(
    sources: Path, wanted: dict[str, str], tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = remote(sources, tmp_path)
    few = {**whole, "streams": {name: whole["streams"][name] for name in ("columns", "chats")}}
    builds.build_here(few)
    sent = len(s3.requests)
    with monkeypatch.context() as patch:
        patch.setattr(Objects, "put", _stop_at("tokenizer/tokenizer.json", Objects.put))
        with pytest.raises(KeyboardInterrupt):
            builds.build_here(whole)
    verify_shards(f"s3://bucket/{PREFIX}")  # as it was, whatever lies beside it
    elsewhere = {**whole, "work": str(tmp_path / "elsewhere")}
    with pytest.raises(UserError, match=r"limited/train/index.json is not of this build: choose another `output`"):
        builds.build_here(elsewhere)
    builds.build_here(whole)
    assert objects(s3) == wanted
    changed = [line.split()[1] for line in s3.requests[sent:] if line.startswith(("PUT", "DELETE"))]
    assert not [path for path in changed if "/columns/" in path or "/chats/" in path]
    builds.build_here({**few, "rebuild": True})
    assert not [key for key in objects(s3) if "limited" in key]
    verify_shards(f"s3://bucket/{PREFIX}")
