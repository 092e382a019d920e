"""A mix off its plan stops the run; steps.jsonl after a resume holds exactly the steps before it."""

import json
import os
import signal
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from threading import Thread

import pytest

from chimera.commands.train import main as train
from chimera.train.data import mixture
from chimera.train.order.ordering import RunOrder
from chimera.train.run.step_files import keep_steps
from tests.train.conftest import steps_of


def test_realised_and_planned_tokens_stand_in_steps_and_metrics(overrides, tmp_path):
    train(overrides("run", "max_duration=24ba"))
    shares = {
        "knowledge": {"en_cosmopedia": 0.55, "it_culturax": 0.35, "it_instructions": 0.1},
        "alignment": {"en_cosmopedia": 0.2, "it_culturax": 0.25, "it_instructions": 0.55},
    }
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    sums: dict[str, dict[str, int]] = {phase: dict.fromkeys(names, 0) for phase, names in shares.items()}
    tokens: dict[str, dict[str, int]] = {phase: dict.fromkeys(names, 0) for phase, names in shares.items()}
    steps = steps_of(tmp_path / "run")
    assert len(steps) == len(metrics) == 24
    for line, logged in zip(steps, metrics, strict=True):
        counted = sums[line["phase"]]
        for name, positions in line["streams"].items():
            counted[name] += positions
        assert line["realised"] == counted
        due = {name: share * sum(counted.values()) for name, share in shares[line["phase"]].items()}
        assert line["planned"] == pytest.approx(due)
        assert all(abs(counted[name] - due[name]) < 128 for name in due)
        real = tokens[line["phase"]]
        for name, count in line["stream_tokens"].items():
            real[name] += count
        for name in due:
            assert logged[f"mix/positions/{name}"] == counted[name]
            assert logged[f"mix/planned_positions/{name}"] == line["planned"][name]
            assert logged[f"mix/tokens/{name}"] == real[name]
            assert logged[f"mix/planned_tokens/{name}"] == pytest.approx(
                shares[line["phase"]][name] * sum(real.values())
            )
        assert line["tokens"] == sum(line["stream_tokens"].values()) == line["positions"] - line["padding"]
        assert line["positions"] == sum(line["streams"].values())


def test_a_mix_off_by_a_block_stops_the_run(overrides, tmp_path, monkeypatch):
    # Data drawn from proportions other than the config's, which only the count of what arrives can tell.
    def drifted(plan, *args):
        shares = zip(plan.streams, (Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)), strict=True)
        first = replace(plan.phases[0], proportions=dict(shares))
        return RunOrder(replace(plan, phases=(first, *plan.phases[1:])), *args)

    monkeypatch.setattr(mixture, "RunOrder", drifted)
    with pytest.raises(RuntimeError, match=r"stream `\w+` has had \d+ of the \d+ positions of phase knowledge"):
        train(overrides("run", "max_duration=20ba"))
    steps = steps_of(tmp_path / "run")
    assert 0 < len(steps) < 20  # the step it shows at is not trained on
    shares = {"en_cosmopedia": 0.55, "it_culturax": 0.35, "it_instructions": 0.1}
    for line in steps:
        total = sum(line["realised"].values())
        assert all(abs(line["realised"][name] - share * total) < 128 for name, share in shares.items())


def test_what_the_end_evaluates_and_a_stop_leaves_is_written(overrides, tmp_path, capsys):
    config = overrides("run", "eval={interval: 4, blocks: 2, seq_lens: [32]}")

    def stop_at(step: int) -> None:
        while not (tmp_path / "run/steps.jsonl").exists() or len(steps_of(tmp_path / "run")) <= step:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=stop_at, args=[6], daemon=True).start()
    assert train(config) == 143
    stopped = lines(tmp_path / "run/metrics.jsonl")
    assert stopped == lines(tmp_path / "run/steps.jsonl") == list(range(len(stopped)))
    assert train([*config, "max_duration=18ba"]) == 0
    assert "warning" not in capsys.readouterr().err
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(18))
    evaluated = [line["step"] for line in metrics if "metrics/eval/it_culturax/32/loss" in line]
    assert evaluated == [3, 7, 11, 15, 17]
    assert all("loss/train/tokens" in line for line in metrics)


def test_the_lines_of_a_run_without_a_checkpoint_are_kept_aside(tmp_path, capsys):
    path, old = tmp_path / "steps.jsonl", tmp_path / "steps.jsonl.old"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    keep_steps(path, 0)
    assert lines(old) == [0, 1]
    assert not path.exists()
    assert "the steps.jsonl of before is kept as steps.jsonl.old" in capsys.readouterr().err
    path.write_text('{"step": 0}\n')
    keep_steps(path, 0)
    assert lines(old) == [0, 1], "a shorter one does not take its place"
    assert not path.exists()


def lines(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_past_the_checkpoint_and_a_torn_line_are_dropped(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(8)) + '{"step": 8, "di')
    keep_steps(path, 5)
    assert lines(path) == [0, 1, 2, 3, 4]
    keep_steps(path, 5)
    assert lines(path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("damaged", ['{"st\0\0', '{"step": "1"}', '{"step": null}', "[1]"])
def test_a_damaged_line_takes_none_of_those_after_it_along(damaged, tmp_path, capsys):
    path = tmp_path / "steps.jsonl"
    path.write_text(f'{{"step": 0}}\n{damaged}\n{{"step": 2}}\n')
    keep_steps(path, 3)
    assert lines(path) == [0, 2]
    assert "goes from step 0 to 2" in capsys.readouterr().err


def test_a_torn_line_alone_is_dropped(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}')
    keep_steps(path, 2)
    assert lines(path) == [0]


def test_missing_steps_are_said(tmp_path, capsys):
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 0}\n{"step": 3}\n')
    keep_steps(path, 6)
    said = capsys.readouterr().err
    assert "goes from step 0 to 3" in said
    assert "ends at step 3, the checkpoint at 5" in said
    assert lines(path) == [0, 3]


def test_a_branchs_file_begins_at_its_first_step_without_a_warning(tmp_path, capsys):
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 3}\n{"step": 4}\n')
    keep_steps(path, 5)
    assert lines(path) == [3, 4]
    keep_steps(path, 3)
    assert lines(path) == []
    said = capsys.readouterr().err.splitlines()
    assert said == [f"warning: {path} is empty, the checkpoint at 2"]


def test_no_file_is_no_matter(tmp_path):
    keep_steps(tmp_path / "steps.jsonl", 5)
    assert not (tmp_path / "steps.jsonl").exists()
