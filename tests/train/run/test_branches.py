"""Runs that begin with a checkpoint of another run: which one, what is recorded of it, and what is refused."""

import hashlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chimera.cli import UserError
from chimera.commands import inspect_batch, plan
from chimera.commands.train import main
from tests.train.conftest import ROOT, SMALL, forget_trackers, steps_of, weights_of

Overrides = Callable[..., list[str]]


@pytest.fixture(scope="module")
def parent(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 5, 10, 15 and 20."""
    folder = tmp_path_factory.mktemp("parent") / "run"
    where = [f"shards={demo_shards}", f"cache={demo_shards.parent}/cache", f"save_folder={folder}", "run_name=parent"]
    main([str(ROOT / "yamls/demo/base.yaml"), *SMALL, *where, "max_duration=20ba"])
    return folder


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_branch_begins_at_a_step_of_its_parent_names_it_and_goes_on_without_it(
    overrides: Overrides, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(parent)
    config = overrides("branch", "run_name=b", f"branch={{from: {moved}, step: 10}}")
    main([*config, "max_duration=15ba"])
    assert f"starting at step 10 of 15 from {moved}/ep0-ba10-rank0.pt, a branch of parent" in capsys.readouterr().err
    moved.unlink()
    main([*config, "max_duration=20ba"])  # the same command; the parent is gone
    assert f"starting at step 15 of 20 from {tmp_path}/branch/ep0-ba15-rank0.pt\n" in capsys.readouterr().err

    checkpoint = parent / "ep0-ba10-rank0.pt"
    expected = {
        "address": str(moved),
        "checkpoint": str(checkpoint),
        "step": 10,
        "digest": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "run_name": "parent",
    }
    branch = tmp_path / "branch"
    starts, steps = lines_of(branch / "starts.jsonl"), steps_of(branch)
    assert [(start["from_step"], start["parent"]) for start in starts] == [(10, expected), (15, expected)]
    assert json.loads((branch / "config.json").read_text())["parent"] == expected
    assert steps[0].pop("parent") == expected
    assert steps == steps_of(parent)[10:]
    ours, theirs = weights_of(branch, 20), weights_of(parent, 20)
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_without_a_step_the_newest_whole_checkpoint_is_taken_and_a_file_is_as_good(
    overrides: Overrides, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for step in (15, 20):
        (copy / f"ep0-ba{step}-rank0.pt").write_bytes((parent / f"ep0-ba{step}-rank0.pt").read_bytes()[: step * -100])
    (copy / "ep0-ba10-rank0.pt").symlink_to(parent / "ep0-ba10-rank0.pt")
    main(overrides("newest", f"branch.from={copy}", "max_duration=11ba"))
    assert capsys.readouterr().err.count("is damaged") == 2
    with pytest.raises(UserError, match=r"`branch.from`: checkpoint .*ba15-rank0.pt cannot be read"):
        main(overrides("damaged", f"branch={{from: {copy}, step: 15}}"))
    latest = parent / "latest-rank0.pt"
    main(overrides("file", f"branch.from={latest}", "max_duration=21ba"))
    assert [line["step"] for line in steps_of(tmp_path / "newest")] == [10]
    (line,) = steps_of(tmp_path / "file")
    assert (line["parent"]["address"], line["parent"]["step"]) == (str(latest), 20)
    assert line["parent"]["checkpoint"] == str(latest.resolve())


def test_what_a_branch_cannot_begin_with_is_refused(overrides: Overrides, parent: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    twelve = rf"`branch.step` is 12, but {parent} holds no checkpoint of it, only of step 5, 10, 15, 20: give one of"
    for given, message in (
        (f"{{from: {parent}, step: 12}}", twelve),
        (f"{{from: {parent}/latest-rank0.pt, step: 12}}", "`branch.step` is 12, but .*latest-rank0.pt holds step 20"),
        (f"{{from: {tmp_path}/empty}}", "`branch.from`: .*/empty holds no checkpoint"),
        (f"{{from: {tmp_path}/nowhere}}", "`branch.from`: checkpoint .*/nowhere cannot be read: .*No such file"),
    ):
        with pytest.raises(UserError, match=message):
            main(overrides("branch", f"branch={given}"))
    (tmp_path / "own").mkdir()
    (tmp_path / "own/start.pt").write_bytes((parent / "ep0-ba5-rank0.pt").read_bytes())
    with pytest.raises(UserError, match=r"`branch\.from` is in the run's own save_folder"):
        main(overrides("own", f"branch.from={tmp_path}/own/start.pt"))


def test_a_branch_that_is_under_way_takes_no_other_parent(overrides: Overrides, parent: Path, tmp_path: Path) -> None:
    main(overrides("branch", f"branch={{from: {parent}, step: 5}}", "max_duration=6ba"))
    main(overrides("run", "max_duration=2ba"))
    for name, given, was in (
        ("branch", f"{{from: {parent}, step: 10}}", f"began at step 5 of {parent}: a branch begins in a"),
        ("branch", f"{{from: {tmp_path}/run}}", f"began at step 5 of {parent}"),
        ("run", f"{{from: {parent}}}", "is no branch of another"),
    ):
        with pytest.raises(UserError, match=rf"`branch` asks for .* but the run in {tmp_path}/{name} {was}"):
            main(overrides(name, f"branch={given}"))
    with pytest.raises(UserError, match="autoresume=true"):
        main(overrides("branch", f"branch={{from: {parent}, step: 5}}", "autoresume=false"))
    main(overrides("branch", f"branch.from={parent}", "max_duration=7ba"))  # whichever step it was
    main(overrides("branch", "max_duration=8ba"))
    assert [start["parent"]["step"] for start in lines_of(tmp_path / "branch/starts.jsonl")] == [5, 5, 5]


OTHER = "phases.0.proportions={en_cosmopedia: 0.5, it_culturax: 0.4, it_instructions: 0.1}"


@pytest.mark.parametrize(
    ("step", "change", "message"),
    [
        (20, OTHER, r"proportions at step 0 is .*, the checkpoint \(step 20\) was trained with"),
        (20, "seed=18", "setting `seed` is 18"),
        (20, "curriculum.stages.1.from_step=9", "the config changes mixture or length at step 9"),
        (20, "model.num_hidden_layers=1", "`model`: num_hidden_layers is 1"),
        (20, "optimizer.name=muon", "`optimizer.name` is muon"),
        (12, "seed=17", "holds no checkpoint of it, only of step 5, 10, 15, 20"),
        (20, "min_start_step=21", "this config starts at step 21 or later"),
    ],
)
def test_plan_and_inspect_batch_refuse_what_training_refuses_of_a_branch(
    overrides: Overrides, parent: Path, capsys: pytest.CaptureFixture[str], step: int, change: str, message: str
) -> None:
    config = overrides("branch", f"branch={{from: {parent}, step: {step}}}", change)
    with pytest.raises(UserError, match=message) as refused:
        main(config)
    with pytest.raises(UserError) as inspected:
        inspect_batch.main([*config, "step=20"])
    assert str(inspected.value) == str(refused.value)
    capsys.readouterr()
    assert plan.main(config) == 2
    assert f"warning: training would refuse this: {refused.value}" in capsys.readouterr().err


def test_plan_and_inspect_batch_take_a_branch_that_training_takes(
    overrides: Overrides, parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = OTHER.replace("phases.0", "phases.1")
    config = overrides("branch", f"branch={{from: {parent}, step: 20}}", later)
    assert plan.main(config) == 0
    assert inspect_batch.main([*config, "step=22", "--json"]) == 0
    digest = json.loads(capsys.readouterr().out.splitlines()[-1])["digest"]
    assert not (tmp_path / "branch").exists()
    main([*config, "max_duration=23ba"])
    assert steps_of(tmp_path / "branch")[2]["digest"] == digest
    assert plan.main(config) == 0, "also of one under way"


def test_trackers_are_told_of_the_parent(
    overrides: Overrides, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    forget_trackers()
    for name, value in (("MLFLOW_TRACKING_URI", uri), ("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    given = [f"branch={{from: {parent}, step: 5}}", "run_name=b", "loggers=[tensorboard, wandb, mlflow]"]
    main(overrides("branch", *given, "max_duration=6ba"))
    words = f"branch of parent at step 5: {parent}/ep0-ba5-rank0.pt"
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert words.encode() in file.read_bytes()
    assert b"start_0/parent" in file.read_bytes()
    assert b"2\x06parent" in file.read_bytes(), "its group"
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select value from tags where key = 'branch'").fetchall() == [(words,)]
    events = EventAccumulator(str(tmp_path / "branch/tensorboard/b")).Reload()
    (text,) = events.Tensors("branch/text_summary")
    assert (text.step, text.tensor_proto.string_val) == (5, [words.encode()])
