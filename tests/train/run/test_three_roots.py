"""A run over three roots of three kinds - a folder of ours, a store, MDS made by others - under the real trainer."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from streaming import MDSWriter

from chimera.commands import inspect_batch, plan, report
from chimera.commands.train import main
from chimera.train.data import remote
from chimera.train.data.mixture import MixtureDataset
from tests.convert.s3_server import KEY, SECRET, S3Server
from tests.train.conftest import steps_of
from tests.train.make_shards import plan_for
from tests.train.run.test_launches import finish, launch, wait_for_step

Overrides = Callable[..., list[str]]
LOCAL, STORED, OTHERS = "en_cosmopedia", "it_culturax", "it_instructions"  # where each stream goes
BLOCK_LEN = 128


@pytest.fixture
def roots(demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The demo's streams in a root each, and the `shards`, `tokenizer` and `cache` that a run over them is given."""
    ours, stored = root_of(demo_shards, tmp_path / "ours", LOCAL), root_of(demo_shards, tmp_path / "stored", STORED)
    write_as_others(demo_shards, tmp_path / "others" / OTHERS)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(demo_shards / "tokenizer/tokenizer.json", tokenizer)
    (tokenizer / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    with S3Server(tmp_path / "s3", seaweed=True) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        client = boto3.client(
            "s3", endpoint_url=server.url, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1"
        )
        for path in sorted(path for path in stored.rglob("*") if path.is_file()):
            client.upload_file(str(path), "bucket", f"shards/{path.relative_to(stored)}")
        shutil.rmtree(stored)
        remote.forget_clients()  # they hold another test's server
        places = f"shards=[{ours}, s3://bucket/shards, {tmp_path}/others]"
        yield [places, f"tokenizer={tokenizer}", f"cache={tmp_path}/cache", "model.attention_dropout=0.0"]


def root_of(demo_shards: Path, root: Path, stream: str) -> Path:
    """A root of ours with one of the demo's streams."""
    shutil.copytree(demo_shards / stream, root / stream)
    shutil.copytree(demo_shards / "tokenizer", root / "tokenizer")
    manifest = json.loads((demo_shards / "manifest.json").read_text())
    for part in (manifest, manifest["settings"]):
        part["streams"] = {stream: part["streams"][stream]}
    manifest.pop("sha256", None)  # which is of the whole
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def write_as_others(demo_shards: Path, folder: Path) -> None:
    """The blocks of a stream in as many shards, as streaming's own writer leaves them: without a manifest."""
    one = plan_for([(1, {OTHERS: 1})], {0: BLOCK_LEN}, 1, 1, BLOCK_LEN)
    data = MixtureDataset(root=str(demo_shards), cache=str(demo_shards.parent / "cache"), plan=one, seed=1)
    shards = data.indexes[OTHERS].shard_blocks
    assert len(shards) == 1, "the order is by shards: what is written has one too"
    tokens, _ = data.read_blocks(OTHERS, range(sum(shards)))
    with MDSWriter(out=str(folder), columns={"tokens": "ndarray:uint16"}) as out:
        for block in tokens:
            out.write({"tokens": block})


def digests_of(folder: Path) -> list[str]:
    return [line["digest"] for line in steps_of(folder)]


def test_a_run_over_three_roots_goes_on_with_other_ranks_as_one_over_a_single_root(
    overrides: Overrides, roots: list[str], tmp_path: Path, warm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(overrides("whole", "model.attention_dropout=0.0"))
    config = overrides("three", *roots)
    assert plan.main([*config, "--json"]) == 0
    streams = json.loads(capsys.readouterr().out)["streams"]
    assert [stream["root"] for stream in streams.values()] == [
        f"{tmp_path}/ours", "s3://bucket/shards", f"{tmp_path}/others"
    ]  # fmt: skip
    code, output = finish(launch(2, *config, "max_duration=12ba", composer=warm / "composer"))
    assert code == 0, output
    main(config)  # one rank
    assert "starting at step 12 of 30" in capsys.readouterr().err
    assert digests_of(tmp_path / "three") == digests_of(tmp_path / "whole")
    ours, theirs = steps_of(tmp_path / "three"), steps_of(tmp_path / "whole")
    assert [line["streams"] for line in ours] == [line["streams"] for line in theirs]
    first = next(at for at, line in enumerate(theirs) if line["streams"][OTHERS])  # made by others: padding is learned
    assert first > 0
    losses = [[line["loss"] for line in lines[:first]] for lines in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5), "the same tokens, from both roots of ours"
    assert inspect_batch.main([*config, "step=25", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == digests_of(tmp_path / "whole")[25]
    assert report.main([f"{tmp_path}/three", f"{tmp_path}/whole", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["same_batches"], about["runs"][0]["digests"]["compared"]) == (30, 30)


@pytest.mark.chaos
def test_kills_of_a_run_over_three_roots_on_two_four_and_one_ranks(
    overrides: Overrides, roots: list[str], tmp_path: Path
) -> None:
    longer = ["phases.0.steps=40", "phases.1.steps=20"]
    main(overrides("whole", "model.attention_dropout=0.0", *longer))
    config = [*overrides("three", *roots), *longer]
    for ranks, until in ((2, 12), (4, 25), (1, 42)):
        process = launch(ranks, *config)
        wait_for_step(process, tmp_path / "three", until)
        os.killpg(process.pid, signal.SIGKILL)
        finish(process)
    shutil.rmtree(tmp_path / "cache")  # as on another machine
    code, output = finish(launch(2, *config, "num_workers=1"))
    assert code == 0, output
    assert digests_of(tmp_path / "three") == digests_of(tmp_path / "whole")
