"""Where checkpoints go: a disk that fills up, and an object store."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from chimera.cli import UserError
from chimera.commands.evaluate import main as evaluate
from chimera.commands.export_hf import main as export
from chimera.commands.plan import main as plan
from chimera.commands.report import main as report
from chimera.commands.train import main
from chimera.train.run.run_store import RunStore, run_folder
from tests.convert.s3_server import S3Server
from tests.train.conftest import steps_of, weights_of


@pytest.fixture
def small_disk(tmp_path):
    """A small file system. Needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_nothing_and_says_what_to_do(overrides, tmp_path, small_disk):
    main(overrides("whole", "max_duration=20ba"))
    size = (tmp_path / "whole" / "ep0-ba5-rank0.pt").stat().st_size
    filler = small_disk / "filler"
    free = os.statvfs(small_disk)
    filler.write_bytes(b"x" * int(free.f_bavail * free.f_frsize - 2.5 * size))
    config = [*overrides("run", "max_duration=20ba"), f"save_folder={small_disk}/run"]
    with pytest.raises(UserError, match=r"could not be written.*autoresume=true"):
        main(config)
    left = sorted(path.name for path in (small_disk / "run").glob("ep*.pt"))
    assert left == ["ep0-ba10-rank0.pt", "ep0-ba5-rank0.pt"]
    filler.unlink()
    main(config)
    assert steps_of(small_disk / "run") == steps_of(tmp_path / "whole")


@pytest.fixture
def s3(tmp_path, monkeypatch):
    server = S3Server(tmp_path / "s3")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.stop()


def test_checkpoints_in_an_object_store_resume_past_a_damaged_one(s3, overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(overrides("whole", "max_duration=20ba"))
    remote = [*overrides("unused"), "save_folder=s3://bucket/runs/a", "run_name=a"]
    main([*remote, "max_duration=10ba"])
    stored = tmp_path / "s3" / "bucket" / "runs" / "a"
    assert {"ep0-ba5-rank0.pt", "ep0-ba10-rank0.pt"} <= {path.name for path in stored.iterdir()}
    assert {"steps.jsonl", "config.json"} <= {path.name for path in stored.iterdir()}

    with pytest.raises(UserError, match="s3://bucket/runs/a holds the checkpoints of an earlier run, up to step 10"):
        main([*remote, "autoresume=false"])

    newest = stored / "ep0-ba10-rank0.pt"
    newest.write_bytes(newest.read_bytes()[:10_000])
    subprocess.run(["rm", "-rf", "runs"], check=True)  # another machine: nothing local is left
    main([*remote, "max_duration=20ba"])
    assert "s3://bucket/runs/a/ep0-ba10-rank0.pt is damaged" in capsys.readouterr().err
    (local,) = Path("runs").iterdir()
    assert local == run_folder("a", "s3://bucket/runs/a")
    assert steps_of(local) == steps_of(tmp_path / "whole")
    assert not list(local.glob("*.pt")) + list(local.glob(".fetched*")), "a fetched checkpoint does not stay"

    assert export(["s3://bucket/runs/a/latest-rank0.pt", str(tmp_path / "hf")]) == 0
    assert "after 20 steps" in (tmp_path / "hf" / "README.md").read_text()
    with pytest.raises(UserError, match=r"checkpoint s3://bucket/runs/a/ep0-ba7-rank0\.pt cannot be fetched"):
        export(["s3://bucket/runs/a/ep0-ba7-rank0.pt", str(tmp_path / "none")])

    capsys.readouterr()
    assert evaluate(["s3://bucket/runs/a/latest-rank0.pt", "eval.blocks=1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["streams"]["it_culturax"]["128"]["tokens"] > 0) == (20, True)
    with pytest.raises(UserError, match=r"no config\.json beside s3://bucket/none/latest-rank0\.pt"):
        evaluate(["s3://bucket/none/latest-rank0.pt"])

    branch = overrides("branch", "load_path=s3://bucket/runs/a/latest-rank0.pt", "min_start_step=20")
    main([*branch, "max_duration=22ba"])
    assert "starting at step 20 of 22 from s3://bucket/runs/a/latest-rank0.pt" in capsys.readouterr().err
    assert [line["step"] for line in steps_of(tmp_path / "branch")] == [20, 21]
    with pytest.raises(UserError, match=r"checkpoint s3://bucket/b/latest-rank0\.pt cannot be fetched"):
        main(overrides("other", "load_path=s3://bucket/b/latest-rank0.pt"))
    branch = overrides("by-step", "branch={from: s3://bucket/runs/a, step: 20}")
    assert plan([*branch, "--json"]) == 0
    before = len(s3.requests)
    main([*branch[:-1], "branch={from: s3://bucket/runs/a}", "max_duration=21ba"])
    assert sum(request.startswith("GET /bucket/runs/a/ep0-ba20") for request in s3.requests[before:]) == 1
    (line,) = steps_of(tmp_path / "by-step")
    parent = {"address": "s3://bucket/runs/a", "checkpoint": "s3://bucket/runs/a/ep0-ba20-rank0.pt", "run_name": "a"}
    assert parent.items() <= line["parent"].items()
    with pytest.raises(UserError, match="s3://bucket/runs/a holds no checkpoint of it, only of step 5, 10, 15, 20: "):
        main([*branch[:-1], "branch={from: s3://bucket/runs/a, step: 12}", "run_name=c", f"save_folder={tmp_path}/c"])
    assert report(["s3://bucket/runs/a", f"{tmp_path}/by-step", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["runs"][0]["checkpoints"]) == 4
    with pytest.raises(UserError, match="save_folder s3://nobody/a cannot be listed"):
        main([*overrides("unused"), "save_folder=s3://nobody/a"])

    (tmp_path / "end").mkdir()
    (stored / "ep0-ba20-rank0.pt").rename(tmp_path / "end" / "ep0-ba20-rank0.pt")
    ours, theirs = weights_of(tmp_path / "end", 20), weights_of(tmp_path / "whole", 20)
    assert all((ours[name] == theirs[name]).all() for name in theirs)


@pytest.mark.usefixtures("s3")
def test_runs_of_one_name_in_two_stores_share_nothing(overrides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = [*overrides("unused"), "run_name=a"]
    main([*config, "save_folder=s3://bucket/one", "max_duration=5ba"])
    main([*config, "save_folder=s3://bucket/two", "seed=18", "max_duration=5ba"])
    one, two = (steps_of(run_folder("a", f"s3://bucket/{name}")) for name in ("one", "two"))
    assert (len(one), len(two)) == (5, 5)
    assert not {line["digest"] for line in one} & {line["digest"] for line in two}


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize(
    ("there", "here", "start", "kept"),
    [
        (range(20), range(10), 20, "there"),  # another machine went on
        (range(10), range(15), 15, "here"),  # the store's copy was not sent any more
        (range(10, 20), range(10, 22), 15, "there"),  # of a branch: its lines are fewer than its steps
        (range(10), range(0), 0, "there"),  # the checkpoints are gone: to be kept as `.old`
        (range(10), range(12), 0, "here"),
    ],
)
def test_of_two_copies_of_the_steps_the_one_that_counts_is_kept(tmp_path, there, here, start, kept):
    texts = {
        name: "".join(f'{{"step": {step}, "of": "{name}"}}\n' for step in steps)
        for name, steps in (("there", there), ("here", here))
    }
    for name in texts:
        (tmp_path / name).mkdir()
        (tmp_path / name / "steps.jsonl").write_text(texts[name])
    RunStore("s3://bucket/run").push_files(tmp_path / "there")
    RunStore("s3://bucket/run").fetch_files(tmp_path / "here", start)
    assert (tmp_path / "here/steps.jsonl").read_text() == texts[kept]


@pytest.mark.usefixtures("s3")
def test_steps_in_a_store_without_checkpoints_are_kept_as_old(overrides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "before").mkdir()
    (tmp_path / "before/steps.jsonl").write_text('{"step": 0}\n')
    RunStore("s3://bucket/a").push_files(tmp_path / "before")
    main([*overrides("unused"), "save_folder=s3://bucket/a", "max_duration=2ba", "run_name=a"])
    local = run_folder("a", "s3://bucket/a")
    assert (local / "steps.jsonl.old").read_text() == '{"step": 0}\n'
    assert [line["step"] for line in steps_of(local)] == [0, 1]


@pytest.mark.usefixtures("s3")
@pytest.mark.chaos  # four starts, each with uploaders that import Composer
def test_a_run_that_goes_back_to_a_machine_finds_what_the_other_added(overrides, tmp_path, monkeypatch, capsys):
    main(overrides("whole", "max_duration=15ba"))
    remote = [*overrides("unused"), "save_folder=s3://bucket/a", "run_name=a"]
    for machine, until in (("first", 5), ("second", 10), ("first", 15)):
        (tmp_path / machine).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / machine)
        main([*remote, f"max_duration={until}ba", "eval={interval: 4, blocks: 2}"])
    said = capsys.readouterr().err
    assert "warning" not in said
    local = run_folder("a", "s3://bucket/a")
    assert f"the report reads {local}" in said
    assert steps_of(local) == steps_of(tmp_path / "whole")
    starts = [json.loads(line)["from_step"] for line in (local / "starts.jsonl").read_text().splitlines()]
    assert starts == [0, 5, 10]
    metrics = [json.loads(line) for line in (local / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(15))
    evaluated = [line["step"] for line in metrics if "metrics/eval/it_culturax/32/loss" in line]
    assert evaluated == [3, 4, 7, 9, 11, 14], "also those at the end of each start"
    for file in ("steps.jsonl", "metrics.jsonl", "starts.jsonl"):
        assert (tmp_path / "s3/bucket/a" / file).read_bytes() == (local / file).read_bytes()
