"""Shards in an object store: a real S3 server, also one that is busy, stopped, or lacks what is asked for."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from chimera.cli import UserError
from chimera.train.data import remote
from chimera.train.data.mixture import MixtureDataset
from tests.convert.s3_server import KEY, SECRET, S3Server
from tests.train.make_shards import block_tokens, make_shards, plan_for

STREAMS = {"en": [9] * 6, "it": [7] * 5}
PLAN = plan_for([(10, {"en": 3, "it": 2})])


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with S3Server(tmp_path / "s3") as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        make_shards(server.root / "bucket" / "shards", STREAMS)
        remote.forget_clients()  # they hold another test's server
        yield server


def dataset(cache: Path, root: str = "s3://bucket/shards", **changes: Any) -> MixtureDataset:
    return MixtureDataset(root=root, cache=str(cache), plan=PLAN, seed=17, **changes)


def check(record: dict[str, Any]) -> None:
    names = [PLAN.streams[number] for number in record["stream"]]
    expected = [block_tokens(name, block) for name, block in zip(names, record["block"].tolist(), strict=True)]
    assert np.array_equal(record["tokens"], np.stack(expected))


def fetched(s3: S3Server) -> Counter[str]:
    return Counter(r.split("?")[0] for r in s3.requests if r.startswith("GET") and ".mds" in r)


def test_ranks_and_workers_of_a_node_fetch_each_shard_once(s3: S3Server, tmp_path: Path) -> None:
    for rank in range(2):
        data = dataset(tmp_path / "cache", rank=rank, world_size=2)
        for record in DataLoader(data, batch_size=None, collate_fn=lambda record: record, num_workers=2):
            check(record)
    assert len(fetched(s3)) == 11
    assert set(fetched(s3).values()) == {1}


@pytest.mark.parametrize("scheme", ["file:", "file://"])
def test_a_file_is_read_behind_one_slash_or_three(scheme: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"data")
    remote.download(f"{scheme}{tmp_path}/a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"data"


def test_a_busy_server_is_asked_again(s3: S3Server, tmp_path: Path) -> None:
    data = dataset(tmp_path / "cache")
    s3.errors = 3
    for record in data:
        check(record)
    assert (s3.errors, s3.given) == (0, 3)


def test_a_server_that_comes_back_is_read_on(s3: S3Server, tmp_path: Path) -> None:
    records = iter(dataset(tmp_path / "cache", predownload=0))
    check(next(records))
    s3.stop()
    s3.start()
    for record in records:
        check(record)


@pytest.mark.usefixtures("s3")
def test_a_shards_number_is_not_taken_for_the_answer_404(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:1")  # nobody listens: the error names the address in full
    remote.forget_clients()
    with pytest.raises(OSError, match=r"shard\.00404") as error:
        remote.download("s3://bucket/shard.00404.mds", tmp_path / "shard.mds")
    assert not isinstance(error.value, FileNotFoundError)
    remote.forget_clients()


def test_a_shard_missing_in_the_store_is_named_and_no_secret_is(s3: S3Server, tmp_path: Path) -> None:
    (s3.root / "bucket" / "shards" / "it" / "train" / "shard.00003.mds.zstd").unlink()
    with pytest.raises(UserError, match=r"shard s3://bucket/shards/it/train/shard.00003.mds.zstd cannot be fetched"):
        list(dataset(tmp_path / "cache"))


@pytest.mark.parametrize("root", ["s3://bucket/elsewhere", "s3://nowhere/shards"])
@pytest.mark.usefixtures("s3")
def test_a_store_without_the_shards_is_one_line(tmp_path: Path, root: str) -> None:
    with pytest.raises(UserError, match=rf"stream en has no train index at {root}/en") as error:
        dataset(tmp_path / "cache", root)
    assert "\n" not in str(error.value)


def test_wrong_credentials_are_one_line_without_them(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert s3.given == 0
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(
        UserError, match=r"s3://bucket/shards cannot be read: .*the store refuses these credentials \(HTTP 403; "
    ) as error:
        dataset(tmp_path / "cache")
    assert not any(word in str(error.value) for word in (KEY, SECRET, "wrong-secret"))


def test_an_unknown_scheme_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"ftp://host/shards cannot be read: .*ftp://host is not an address that can be read: take"
    ):
        dataset(tmp_path / "cache", "ftp://host/shards")
