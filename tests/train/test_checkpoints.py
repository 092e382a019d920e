"""Which checkpoint a run starts from, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chimera.cli import UserError
from train.checkpoints import choose_start, damage_of, duration, find_checkpoints, lock_folder, newest_complete
from train.settings import TrainSettings


def save(folder: Path, step: int, size: int = 50_000) -> Path:
    path = folder / f"ep0-ba{step}-rank0.pt"
    torch.save({"state": {"weights": torch.arange(size)}}, path)
    return path


def settings_for(folder: Path, **changes) -> TrainSettings:
    return TrainSettings(save_folder=str(folder), **changes)


def test_the_newest_is_by_step_not_by_name_or_time(tmp_path):
    for step in (900, 1000, 90):
        save(tmp_path, step)
    assert [step for step, _ in find_checkpoints(tmp_path)] == [1000, 900, 90]


@pytest.mark.parametrize("keep", [0, 10, 1000, -1, -40])
def test_a_torn_checkpoint_is_damaged_at_whatever_byte_it_ends(tmp_path, keep):
    path = save(tmp_path, 1)
    assert damage_of(path) is None
    path.write_bytes(path.read_bytes()[:keep])
    assert damage_of(path)


def test_one_flipped_byte_is_damage(tmp_path):
    path = save(tmp_path, 1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert damage_of(path)


def test_a_damaged_newest_is_passed_over_with_a_warning(tmp_path, capsys):
    good, bad = save(tmp_path, 10), save(tmp_path, 20)
    bad.write_bytes(bad.read_bytes()[:5000])
    assert newest_complete(tmp_path) == (10, good)
    assert "ep0-ba20-rank0.pt is damaged" in capsys.readouterr().err
    assert bad.exists()


def test_autoresume_starts_from_nothing_in_an_empty_folder(tmp_path):
    assert choose_start(settings_for(tmp_path, autoresume=True), tmp_path).path is None


def test_an_earlier_runs_folder_is_not_trained_over(tmp_path):
    save(tmp_path, 10)
    with pytest.raises(UserError, match="autoresume=true"):
        choose_start(settings_for(tmp_path), tmp_path)


def test_a_later_phase_refuses_to_begin_before_its_step(tmp_path):
    with pytest.raises(UserError, match=r"at step 300 or later.*there is none"):
        choose_start(settings_for(tmp_path, autoresume=True, min_start_step=300), tmp_path)
    save(tmp_path, 299)
    with pytest.raises(UserError, match="newest complete one is at step 299"):
        choose_start(settings_for(tmp_path, autoresume=True, min_start_step=300), tmp_path)
    save(tmp_path, 300)
    assert choose_start(settings_for(tmp_path, autoresume=True, min_start_step=300), tmp_path).step == 300


def test_a_given_checkpoint_must_be_readable(tmp_path):
    settings = settings_for(tmp_path / "new", load_path=str(tmp_path / "ep0-ba5-rank0.pt"))
    with pytest.raises(UserError, match="load_path"):
        choose_start(settings, tmp_path / "new")
    save(tmp_path, 5)
    assert choose_start(settings, tmp_path / "new").step == 5


def test_a_second_run_on_a_folder_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    code = (
        "import sys; from pathlib import Path; from train.checkpoints import lock_folder\n"
        "held = lock_folder(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by another run \\(process {other.pid}\\)"):
        lock_folder(tmp_path, patience=0)
    other.kill()
    other.wait()
    lock_folder(tmp_path, patience=5).close()


def test_max_duration_is_in_steps_of_the_plan():
    assert duration("45000ba", 50000).value == 45000
    assert duration(None, 50000).value == 50000
    for wrong in ("1ep", "60000ba", "many"):
        with pytest.raises(UserError, match="max_duration"):
            duration(wrong, 50000)


def test_the_lock_does_not_follow_the_folder_name_into_the_checkpoints(tmp_path):
    with lock_folder(tmp_path):
        assert find_checkpoints(tmp_path) == []
        assert os.listdir(tmp_path) == [".lock"]
