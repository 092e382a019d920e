"""Shards on this machine: verified, fetched again, kept within a limit, shared by processes, safe to kill."""

import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chimera.cli import UserError, parse_bytes
from chimera.train.data.cache import ShardCache, ShardError, locked, smallest_cache
from chimera.train.data.index import open_indexes
from chimera.train.data.mixture import MixtureDataset
from chimera.train.data.reader import BlockReader
from chimera.train.order import ordering
from chimera.train.order.schedule import Plan
from tests.train.make_shards import BLOCK_LEN, block_tokens, make_shards, plan_for

STREAMS = {"en": [9] * 12, "it": [7] * 9}
PLAN = plan_for([(30, {"en": 3, "it": 2})])  # 12 blocks a step: 216 of en (two passes), 144 of it


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordering, "WINDOW_BLOCKS", 20)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_shards(tmp_path / "root", STREAMS)


@pytest.fixture
def remote(root: Path) -> str:
    """The same shards behind a URL: they are fetched, as from an object store."""
    return f"file://{root}"


def dataset(root: Path | str, cache: Path, plan: Plan = PLAN, **changes: Any) -> MixtureDataset:
    return MixtureDataset(root=str(root), cache=str(cache), plan=plan, **{"seed": 17, **changes})


def check(record: dict[str, Any], plan: Plan = PLAN) -> None:
    """The record's tokens are those of the blocks it names."""
    names = [plan.streams[number] for number in record["stream"]]
    expected = [block_tokens(name, block) for name, block in zip(names, record["block"].tolist(), strict=True)]
    assert np.array_equal(record["tokens"], np.stack(expected))


def raw_shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.mds"))


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_shard_in_the_cache_is_fetched_again_and_reported(
    remote: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    for record in dataset(remote, cache):
        check(record)
    for path in raw_shards(cache):
        spoil(path)
    assert capsys.readouterr().err == ""
    for record in dataset(remote, cache):  # another run: what is in the cache is verified when first used
        check(record)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(raw_shards(cache)) == 21
    assert all("was damaged (its hash is not the index's): fetching it again" in line for line in said)


@pytest.mark.parametrize("compression", ["zstd", None])
def test_a_shard_that_is_damaged_while_it_is_mapped_is_never_trained_on(
    tmp_path: Path, compression: str | None
) -> None:
    root, cache = make_shards(tmp_path / "root", STREAMS, compression=compression), tmp_path / "cache"
    records = iter(dataset(root, cache))
    check(next(records))
    for path in raw_shards(cache) if compression else sorted(root.glob("*/train/*.mds")):
        with path.open("r+b") as file:  # in its place, as a disk does it: under the map
            file.seek(half := path.stat().st_size // 2)
            file.write(bytes(half))
    with pytest.raises(ShardError, match=r"was changed while it was read|is damaged"):
        [check(record) for record in records]


def test_a_cut_off_shard_in_the_cache_is_fetched_again(remote: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    list(dataset(remote, cache))
    os.truncate(raw_shards(cache)[0], 10)
    for record in dataset(remote, cache):
        check(record)


def test_a_shard_that_is_damaged_at_its_source_is_named_in_one_line(root: Path, remote: str, tmp_path: Path) -> None:
    bad = root / "it" / "train" / "shard.00004.mds.zstd"
    spoil(bad)
    with pytest.raises(ShardError, match=rf"shard file://{bad} is damaged at its source .* upload or build it again"):
        list(dataset(remote, tmp_path / "cache"))
    with pytest.raises(ShardError, match=rf"shard {bad} is damaged at its source"):  # a local root
        list(dataset(root, tmp_path / "cache2"))


def test_what_does_not_decompress_is_named_even_where_the_index_has_no_hashes(root: Path, tmp_path: Path) -> None:
    index = root / "it" / "train" / "index.json"
    bare = json.loads(index.read_text())
    for shard in bare["shards"]:
        shard["raw_data"]["hashes"] = shard["zip_data"]["hashes"] = {}
    index.write_text(json.dumps(bare))
    (root / "manifest.json").unlink()
    bad = root / "it" / "train" / "shard.00004.mds.zstd"
    bad.write_bytes(bytes(bad.stat().st_size))
    with pytest.raises(ShardError, match=rf"shard {bad} does not decompress to what its index says"):
        list(dataset(root, tmp_path / "cache"))


def test_a_shard_that_is_missing_at_its_source_is_named(root: Path, remote: str, tmp_path: Path) -> None:
    (root / "en" / "train" / "shard.00011.mds.zstd").unlink()
    for place in (remote, root):
        with pytest.raises(ShardError, match=r"shard .*/en/train/shard.00011.mds.zstd (cannot be fetched|is missing)"):
            list(dataset(place, tmp_path / "cache"))


def test_a_shard_that_could_not_be_fetched_ahead_is_fetched_when_it_is_needed(root: Path, tmp_path: Path) -> None:
    """Its source was out of reach for a moment, maybe hours before."""
    indexes = open_indexes(str(root), str(tmp_path / "cache"), ["en"])
    reader = BlockReader(indexes, ShardCache(str(tmp_path / "cache")), BLOCK_LEN)
    (root / "en").rename(root / "elsewhere")
    reader.fetch_ahead([("en", 0), ("en", 1)])
    with pytest.raises(ShardError, match="is missing"):
        reader.shard(("en", 0))
    (root / "elsewhere").rename(root / "en")
    tokens, _ = reader.read(np.zeros(2, np.int32), np.array([0, 9]))
    reader.close()
    assert np.array_equal(tokens, [block_tokens("en", 0), block_tokens("en", 9)])


def test_uncompressed_local_shards_are_read_in_place_and_verified(tmp_path: Path) -> None:
    root = make_shards(tmp_path / "root", STREAMS, compression=None)
    for record in dataset(root, tmp_path / "cache"):
        check(record)
    assert raw_shards(tmp_path / "cache") == []
    spoil(root / "en" / "train" / "shard.00003.mds")
    with pytest.raises(ShardError, match=r"shard .*/shard.00003.mds is damaged .* restore or build it again"):
        list(dataset(root, tmp_path / "cache"))


def test_more_shards_than_files_may_be_open_is_one_line(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for compression in (None, "zstd:3"):
        root = make_shards(tmp_path / str(compression), STREAMS, compression=compression)
        data = dataset(root, tmp_path / "cache")
        with closing(iter(data)) as records:
            next(records)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            try:
                with pytest.raises(ShardError, match=r"^shard \S+.mds cannot be [^\n]*Too many open files[^\n]*$"):
                    list(records)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_cache_that_cannot_be_written_is_one_line(root: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is where the folder should be")
    with pytest.raises(ShardError, match=r"^shard \S+/shard.\d+.mds cannot be kept in \S+/cache: [^\n]*$"):
        list(dataset(root, tmp_path / "cache"))


def test_an_error_keeps_its_one_line_through_a_worker(root: Path, tmp_path: Path) -> None:
    from torch.utils.data import DataLoader

    spoil(root / "en" / "train" / "shard.00000.mds.zstd")
    data = dataset(root, tmp_path / "cache")
    with pytest.raises(UserError, match=r"^shard \S+ is damaged at its source [^\n]*$"):
        list(DataLoader(data, batch_size=None, collate_fn=lambda record: record, num_workers=1))


def test_a_local_root_is_never_written_to(root: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    list(dataset(root, tmp_path / "cache"))
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_shards_built_again_at_the_same_place_are_noticed(root: Path, remote: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    list(dataset(remote, cache))
    shutil.rmtree(root)
    make_shards(root, {"en": [9] * 12, "it": [8] * 9})
    plan = plan_for([(30, {"it": 1})])
    seen = set()
    for record in dataset(remote, cache, plan):
        check(record, plan)
        seen.update(record["block"].tolist())
    assert seen == set(range(72))


@pytest.mark.parametrize("damaged", ["{", "[]", '{"format": 2}'])
def test_a_damaged_manifest_is_one_line(root: Path, tmp_path: Path, damaged: str) -> None:
    (root / "manifest.json").write_text(damaged)
    with pytest.raises(UserError, match=r"/manifest.json is not a manifest of shards: .+"):
        open_indexes(str(root), str(tmp_path / "cache"), ["en"])


def test_an_index_that_the_manifest_does_not_name_is_refused(root: Path, remote: str, tmp_path: Path) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["streams"]["it"]["train"]["index"] = "0" * 64
    manifest.pop("sha256", None)
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"/it/train/index.json is not the one the manifest of file://.* names"):
        dataset(remote, tmp_path / "cache")


def test_a_misspelled_stream_is_named(remote: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stream `itt` \(in `phases`\) is not in the shards at file:"):
        dataset(remote, tmp_path / "cache", plan_for([(30, {"itt": 1})]))


def test_names_in_an_index_are_not_paths(root: Path, tmp_path: Path) -> None:
    path = root / "en" / "train" / "index.json"
    (root / "manifest.json").unlink()
    path.write_text(path.read_text().replace("shard.00002.mds", "../../../etc/passwd"))
    with pytest.raises(UserError, match=r"index.json is no index of MDS shards: .*file name"):
        dataset(root, tmp_path / "cache")


# The limit


def used(cache: Path) -> int:
    """Bytes of the shards in a cache, and of those that are being fetched."""
    with locked(cache / "limit"):  # so that none moves meanwhile
        return sum(path.stat().st_size for path in cache.glob("*/*.mds*") if path.suffix in (".mds", ".part"))


def test_the_smallest_limit_works_and_holds_at_every_step(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    streams = {"en": [9] * 40, "it": [7] * 40}
    root = make_shards(tmp_path / "long", streams)
    limit = smallest_cache(open_indexes(str(root), str(cache), streams).values(), lanes=1)
    list(dataset(root, tmp_path / "whole", plan_for([(90, {"en": 3, "it": 2})])))
    assert limit < used(tmp_path / "whole") / 2
    most = 0
    for record in dataset(f"file://{root}", cache, plan_for([(90, {"en": 3, "it": 2})]), cache_limit=limit):
        check(record)
        most = max(most, used(cache))
    assert 0 < most <= limit


def test_a_limit_too_small_is_refused_with_the_least_that_works(remote: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`cache_limit` of 2048 bytes is too small: (\d+) hold") as refusal:
        dataset(remote, tmp_path / "cache", cache_limit="2kb")
    least = int(str(refusal.value).split("small: ")[1].split()[0])
    list(dataset(remote, tmp_path / "cache", cache_limit=least))
    with pytest.raises(UserError, match="too small"):
        dataset(remote, tmp_path / "cache", cache_limit=least - 1)


def test_a_limit_on_local_shards_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`cache_limit` is given, but the shards at .* are local"):
        dataset(root, tmp_path / "cache", cache_limit="10gb")


@pytest.mark.parametrize(("text", "count"), [("200gb", 200 << 30), ("1.5 MB", 3 << 19), ("7", 7), (9, 9), ("4k", 4096)])
def test_sizes_are_read(text: str | int, count: int) -> None:
    assert parse_bytes(text, "cache_limit") == count


def test_a_size_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="`cache_limit` is 'lots'"):
        parse_bytes("lots", "cache_limit")


def test_remains_of_a_killed_fetch_make_room(remote: str, tmp_path: Path) -> None:
    indexes = open_indexes(remote, str(tmp_path / "cache"), STREAMS)
    limit = 3 * indexes["en"].shards[0].raw.bytes
    cache = ShardCache(str(tmp_path / "cache"), limit)
    cache.open(indexes["en"], 0)
    path = cache.path(indexes["en"], indexes["en"].shards[1])
    path.with_name(f".{path.name}.part").write_bytes(bytes(2 * indexes["en"].shards[0].raw.bytes))
    path.with_name(f".{path.name}.fetched.d").write_bytes(bytes(9))
    cache.open(indexes["en"], 2)  # would not fit, were the reservation a living process's
    assert used(tmp_path / "cache") <= limit
    assert not path.with_name(f".{path.name}.fetched.d").exists()


# Several processes


def run_job(remote: str, cache: Path, start: int, steps: Any, limit: int | None) -> None:
    """A job that goes on from step `start`, reports each step it has checked, and waits until that is heard."""
    data = dataset(remote, cache, cache_limit=limit, predownload=4)
    data.load_state_dict(data.state_dict(PLAN.sequences_before(start), True))
    for record in data:
        check(record)
        steps.send((record["step"], record["digest"]))
        steps.recv()
    os._exit(0)


def start_job(remote: str, cache: Path, start: int, limit: int | None = None) -> tuple[Any, Any]:
    context = multiprocessing.get_context("fork")  # so that nothing is imported again
    ours, theirs = context.Pipe()
    job = context.Process(target=run_job, args=(remote, cache, start, theirs, limit))
    job.start()
    theirs.close()
    return job, ours


def received(steps: Any) -> Iterator[tuple[int, str]]:
    try:
        while True:
            yield steps.recv()
            steps.send("heard")
    except EOFError:
        return


def test_a_job_killed_twenty_times_goes_on_without_cleaning_up(remote: str, tmp_path: Path) -> None:
    expected = [(r["step"], r["digest"]) for r in dataset(remote, tmp_path / "other")]
    cache = tmp_path / "cache"
    seen: list[tuple[int, str]] = []
    for kill in range(20):
        job, steps = start_job(remote, cache, len(seen))
        if kill % 2:  # after a step
            seen.append(next(received(steps)))
        else:  # while it fetches a shard, if it has to
            while not steps.poll() and not any(cache.glob("*/.*.fetched")):
                pass
        os.kill(job.pid, signal.SIGKILL)
        job.join()
        assert job.exitcode == -signal.SIGKILL
        assert seen == expected[: len(seen)]
    job, steps = start_job(remote, cache, len(seen))
    seen += received(steps)
    job.join()
    assert (job.exitcode, seen) == (0, expected)


@pytest.mark.chaos
def test_two_jobs_killed_at_random_share_a_limited_cache(remote: str, tmp_path: Path) -> None:
    """150 kills at any moment, of two jobs that evict and fetch each other's shards."""
    expected = [(r["step"], r["digest"]) for r in dataset(remote, tmp_path / "other")]
    limit = smallest_cache(open_indexes(remote, str(tmp_path / "cache"), STREAMS).values(), lanes=1)
    dice = random.Random(7)
    seen: list[list[tuple[int, str]]] = [[], []]
    for _ in range(75):
        jobs = [start_job(remote, tmp_path / "cache", len(one) % PLAN.steps, limit) for one in seen]
        threading.Event().wait(dice.random() / 4)
        for (job, steps), one in zip(jobs, seen, strict=True):
            for report in received(steps):
                one.append(report)
                if dice.random() < 0.3:
                    break
            os.kill(job.pid, signal.SIGKILL)
            job.join()
            assert job.exitcode == -signal.SIGKILL or one[-1][0] == PLAN.steps - 1
        assert used(tmp_path / "cache") <= limit
    for one in seen:
        assert len(one) > PLAN.steps
        assert one == [expected[i % PLAN.steps] for i in range(len(one))]


@pytest.mark.parametrize("limited", [True, False])
def test_jobs_share_a_cache_and_local_shards(root: Path, remote: str, tmp_path: Path, limited: bool) -> None:
    expected = [(r["step"], r["digest"]) for r in dataset(remote, tmp_path / "other")]
    limit = smallest_cache(open_indexes(remote, str(tmp_path / "cache"), STREAMS).values(), lanes=1)
    place = (remote, tmp_path / "cache", 0, limit) if limited else (str(root), tmp_path / "cache", 0, None)
    jobs = [start_job(*place) for _ in range(3)]
    for job, steps in jobs:
        assert list(received(steps)) == expected
        job.join()
        assert job.exitcode == 0
    if limited:
        assert used(tmp_path / "cache") <= limit


# Lanes


@pytest.mark.parametrize("nodes", [2, 4])
def test_nodes_download_disjoint_shards_where_lanes_divide_over_them(tmp_path: Path, nodes: int) -> None:
    streams = {"en": [9] * 32, "it": [7, 8, 9, 5] * 7}
    remote = f"file://{make_shards(tmp_path / 'long', streams)}"
    plan = plan_for([(60, {"en": 3, "it": 2})], batch=16, lanes=4)  # more than a pass over each

    def fetched(cache: Path, ranks: range, world_size: int) -> set[tuple[str, str]]:
        for rank in ranks:
            for record in dataset(remote, cache, plan, rank=rank, world_size=world_size):
                check(record, plan)
        return {(path.parent.name, path.name) for path in raw_shards(cache)}

    by_node = [fetched(tmp_path / f"node{n}", range(2 * n, 2 * n + 2), 2 * nodes) for n in range(nodes)]
    assert set.union(*by_node) == fetched(tmp_path / "alone", range(1), 1)
    twice = [shard for one, other in itertools.combinations(by_node, 2) for shard in one & other]
    assert len(twice) <= nodes - 1  # of `it`, at most the shard at each border between nodes
    assert not any(stream.startswith("en") for stream, _ in twice)  # 32 shards: its borders lie between shards
