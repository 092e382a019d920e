"""Ranks as real processes under Composer's launcher: kills, preemption and other rank counts in one run."""

import contextlib
import hashlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from chimera.commands import export_hf
from chimera.commands.train import main
from chimera.train.run.checkpoint_file import damage_of
from chimera.train.run.start import find_checkpoints
from tests.train.conftest import ROOT, rewrite, steps_of, weights_of

COMPOSER = Path(sys.executable).parent / "composer"


def launch(ranks: int, *words: str, composer: Path = COMPOSER, module: str = "chimera.train") -> subprocess.Popen[str]:
    """`composer -n RANKS -m chimera.train …` in a session of its own."""
    return subprocess.Popen(
        [str(composer), "-n", str(ranks), "-m", module, *words],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Return once `step` is in steps.jsonl; fail if the run ends before."""
    while not (folder / "steps.jsonl").exists() or f'{{"step": {step},' not in (folder / "steps.jsonl").read_text():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def test_a_chain_of_kills_on_other_rank_counts_ends_as_the_uninterrupted_run(overrides, tmp_path, capsys):
    longer = [
        "model.attention_dropout=0.0",  # random state is a rank's own
        "phases.0.steps=90",
        "phases.1.steps=30",
        "curriculum.stages=[{from_step: 0, seq_len: 32}, {from_step: 80, seq_len: 64}, {from_step: 100, seq_len: 128}]",
        "save_interval=10",
    ]
    main(overrides("whole", *longer))
    reference = steps_of(tmp_path / "whole")
    folder, config = tmp_path / "chain", overrides("chain", *longer)

    killed = launch(1, *config)
    wait_for_step(killed, folder, 25)
    os.killpg(killed.pid, signal.SIGKILL)
    finish(killed)

    preempted = launch(2, *config, "num_workers=1")  # SIGTERM reaches workers too, which must outlive the save
    wait_for_step(preempted, folder, 50)
    os.killpg(preempted.pid, signal.SIGTERM)
    finish(preempted)  # the launcher itself dies of the signal; its ranks save first
    while (lock := subprocess.run(["flock", "-n", folder / ".lock", "true"])).returncode:
        time.sleep(0.1)
    assert lock.returncode == 0
    stopped_at = steps_of(folder)[-1]["step"] + 1
    assert (folder / f"ep0-ba{stopped_at}-rank0.pt").exists(), "SIGTERM saves within the step"

    assert main(config) == 0
    said = capsys.readouterr().err
    assert f"starting at step {stopped_at} of 120" in said
    assert "warning" not in said, "steps.jsonl and metrics.jsonl reach the checkpoint"
    lines = steps_of(folder)
    assert [line["digest"] for line in lines] == [line["digest"] for line in reference]
    for ours, theirs in zip(lines, reference, strict=True):
        assert ours["streams"] == theirs["streams"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3), ours["step"]


def test_ranks_need_to_divide_the_steps_ahead_only(overrides, tmp_path, warm):
    config = overrides("run", "model.attention_dropout=0.0", "phases.1.global_train_batch_size=24")
    main([*config, "max_duration=20ba"])
    code, output = finish(launch(3, *config, composer=warm / "composer"))
    assert code == 0, output
    assert [line["positions"] for line in steps_of(tmp_path / "run")[20:]] == [24 * 128] * 10


def test_ranks_of_other_shards_are_refused(overrides, demo_shards, tmp_path, warm):
    """A node with an older copy of them: its part of every step would be another run's, and no digest would show it."""
    other = tmp_path / "other"
    shutil.copytree(demo_shards, other)
    index, manifest = other / "it_culturax/train/index.json", other / "manifest.json"
    before = hashlib.sha256(index.read_bytes()).hexdigest()
    index.write_bytes(index.read_bytes() + b"\n")
    after = hashlib.sha256(index.read_bytes()).hexdigest()
    rewrite(manifest, before, after)

    config = overrides("two", "max_duration=2ba")
    host = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host["MASTER_PORT"] = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [str(warm / "python"), "train/main.py", *config, *more],
            env={**os.environ, **host, "RANK": rank, "LOCAL_RANK": rank},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, more in (("0", []), ("1", [f"shards={other}"]))
    ]
    _, said = ranks[0].communicate(timeout=300)
    assert [rank.wait(timeout=60) for rank in ranks] == [2, 2]
    message = r"error: stream it_culturax at `shards` is \w{12} on rank 1 and \w{12} on rank 0: ranks that differ"
    assert re.search(message, said), said
    assert not (tmp_path / "two").exists()


def test_a_rank_that_is_stopped_is_waited_for_and_keeps_other_runs_out(overrides, tmp_path, warm):
    config = ["model.attention_dropout=0.0", "max_duration=20ba"]
    main(overrides("whole", *config))
    process = launch(2, *overrides("run", *config), composer=warm / "composer")
    wait_for_step(process, tmp_path / "run", 2)
    pids = [int(pid) for pid in (tmp_path / "run" / ".lock").read_text().split() if pid.isdigit()]
    rank = pids[0]  # global rank 0, which has the lock
    os.kill(rank, signal.SIGSTOP)
    assert subprocess.run(["flock", "-n", tmp_path / "run" / ".lock", "true"]).returncode == 1
    os.kill(rank, signal.SIGCONT)
    code, output = finish(process)
    assert code == 0, output
    ours, whole = steps_of(tmp_path / "run"), steps_of(tmp_path / "whole")
    assert [line["digest"] for line in ours] == [line["digest"] for line in whole]


def test_the_loss_is_the_mean_over_trained_tokens_on_any_number_of_ranks(overrides, tmp_path, warm):
    # Only what the assistant says is trained, so that ranks and microbatches hold unequal numbers of trained tokens.
    config = ["model.attention_dropout=0.0", "train_on=assistant", "phases.0.proportions.en_cosmopedia=0.25"]
    config += ["phases.0.proportions.it_instructions=0.4", "max_duration=10ba"]
    main(overrides("one", *config))
    code, output = finish(
        launch(2, *overrides("two", *config, "device_train_microbatch_tokens=32"), composer=warm / "composer")
    )
    assert code == 0, output
    for ours, theirs in zip(steps_of(tmp_path / "two"), steps_of(tmp_path / "one"), strict=True):
        assert ours["digest"] == theirs["digest"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), ours["step"]  # four ranks: test_nodes.py


def test_fsdp_trains_saves_and_goes_on_as_plain_ranks_do(overrides, tmp_path, warm):
    how = {"composer": warm / "composer", "module": "tests.train.fsdp_on_cpu"}
    config = ["model.attention_dropout=0.0", "eval={interval: 8, blocks: 2}", "generate.interval=6"]
    main(overrides("whole", *config))
    sharded = [*overrides("run", *config), "parallelism={fsdp: {sharding_strategy: FULL_SHARD}}"]
    code, output = finish(launch(2, *sharded, "max_duration=10ba", **how))
    assert code == 0, output
    main([*overrides("run", *config), "max_duration=20ba"])  # one rank, from the checkpoint of the sharded model
    code, output = finish(launch(2, *sharded, **how))
    assert code == 0, output
    assert "starting at step 20 of 30" in output
    for ours, theirs in zip(steps_of(tmp_path / "run"), steps_of(tmp_path / "whole"), strict=True):
        assert ours["digest"] == theirs["digest"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), ours["step"]
    ours, theirs = weights_of(tmp_path / "run", 30), weights_of(tmp_path / "whole", 30)
    assert all((ours[name] - theirs[name]).abs().max() < 1e-3 for name in theirs)
    assert export_hf.main([f"{tmp_path}/run/latest-rank0.pt", f"{tmp_path}/out"]) == 0  # which the sharded model wrote
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, ours[f"model.{name}"]) for name, tensor in exported.items())


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_moments_end_as_the_uninterrupted_run(overrides, tmp_path):
    """SIGKILL and SIGTERM on 1, 2 and 4 ranks, half of the time while a checkpoint is being written."""
    dice = random.Random(7)
    longer = [
        "model.attention_dropout=0.0",
        "phases.0.steps=700",
        "phases.1.steps=300",
        "curriculum.stages=[{from_step: 0, seq_len: 32}, {from_step: 600, seq_len: 64}, "
        "{from_step: 800, seq_len: 128}]",
        "save_interval=3",
        "save_keep=3",
    ]
    main(overrides("whole", *longer))
    reference = steps_of(tmp_path / "whole")
    folder, config = tmp_path / "chain", overrides("chain", *longer)
    kills = {signal.SIGKILL: 0, signal.SIGTERM: 0}
    torn = 0
    for _ in range(20):
        process = launch(dice.choice([1, 2, 4]), *config)
        first = steps_of(folder)[-1]["step"] if (folder / "steps.jsonl").exists() else 0
        wait_for_step(process, folder, min(first + 1 + dice.randrange(30), 980))
        number = dice.choice(list(kills))
        if dice.random() < 0.5:
            wait_for_writing(folder)
        os.killpg(process.pid, number)
        kills[number] += 1
        finish(process)
        while subprocess.run(["flock", "-n", folder / ".lock", "true"]).returncode:
            time.sleep(0.1)
        found = find_checkpoints(folder)
        torn += bool(found and damage_of(found[0][1]))
    code, output = finish(launch(2, *config))
    assert code == 0, output
    lines = steps_of(folder)
    assert [line["digest"] for line in lines] == [line["digest"] for line in reference]
    worst = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(lines, reference, strict=True))
    print(f"\n{kills}, {torn} torn checkpoints passed over, losses within {worst:.1e}")
    assert worst < 0.02


def wait_for_writing(folder: Path, patience: float = 5) -> None:
    """Return while a checkpoint is being written, if one is seen to be within `patience` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, IndexError):
            if damage_of(find_checkpoints(folder)[0][1]):
                return
        time.sleep(0.001)


def test_a_failing_rank_shows_its_traceback(overrides, tmp_path, warm):
    config = overrides("run", "phases.0.steps=20")
    script = tmp_path / "failing.py"
    script.write_text(
        "import os, sys; sys.path.insert(0, os.getcwd())\n"
        "import chimera.train.step.collate\n"
        "if os.environ['RANK'] == '1':\n"
        "    chimera.train.step.collate.positions = lambda starts: 1 / 0\n"
        "from chimera.commands.train import entry; entry()\n"
    )
    process = subprocess.run(
        [str(warm / "composer"), "-n", "2", str(script), *config], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert process.returncode  # of whichever rank the launcher looks at first
    assert "ZeroDivisionError" in process.stdout
    assert "global rank 1" in process.stdout
