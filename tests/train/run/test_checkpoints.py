"""Which checkpoint a run starts from, and what is refused."""

import errno
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from chimera.cli import UserError
from chimera.train.order.run_plan import end_step
from chimera.train.run.checkpoint_file import damage_of
from chimera.train.run.checkpoints import lock_folder
from chimera.train.run.start import Start, choose_start, find_checkpoints
from chimera.train.settings import TrainSettings, read_settings


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


def test_bytes_flipped_anywhere_are_damage_and_never_an_error(tmp_path):
    dice, path = random.Random(5), save(tmp_path, 1, size=500)
    whole = path.read_bytes()
    for _ in range(400):
        data = bytearray(whole)
        # the directory at the end, whose flags make zipfile raise what is no error of its own, or anywhere
        place = dice.randrange(dice.choice([0, len(data) - 900]), len(data))
        data[place] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
        assert damage_of(path) != ""  # the damage in words, or none: not every bit of a zip file counts


def test_a_damaged_newest_is_passed_over_with_a_warning(tmp_path, capsys):
    good, bad = save(tmp_path, 10), save(tmp_path, 20)
    bad.write_bytes(bad.read_bytes()[:5000])
    assert choose_start(settings_for(tmp_path, autoresume=True), tmp_path) == Start(10, str(good))
    assert "ep0-ba20-rank0.pt is damaged" in capsys.readouterr().err
    assert bad.exists()


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "I/O error")])
def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch, error):
    """A run that passes it over would train its steps again, over the file and its lines of steps.jsonl."""
    save(tmp_path, 10)
    newest, read = save(tmp_path, 20), zipfile.ZipFile

    def refuse(path, *more):
        if Path(path) == newest:
            raise error
        return read(path, *more)

    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    with pytest.raises(UserError, match=rf"checkpoint {newest} cannot be read \(.*{error.strerror}\)"):
        choose_start(settings_for(tmp_path, autoresume=True), tmp_path)


def test_autoresume_starts_from_nothing_in_an_empty_folder(tmp_path):
    assert choose_start(settings_for(tmp_path, autoresume=True), tmp_path).path is None


def test_an_earlier_runs_folder_is_not_trained_over(tmp_path):
    save(tmp_path, 10)
    with pytest.raises(UserError, match="autoresume=true"):
        choose_start(settings_for(tmp_path), tmp_path)


def test_no_start_leaves_later_checkpoints_behind(tmp_path):
    old, new, elsewhere = save(tmp_path, 50), save(tmp_path, 100), tmp_path / "elsewhere"
    with pytest.raises(UserError, match=r"up to step 100.*move the later checkpoints elsewhere"):
        choose_start(settings_for(tmp_path, load_path=str(old)), tmp_path)
    (tmp_path / "latest-rank0.pt").symlink_to(new.name)
    for path in (new, tmp_path / "latest-rank0.pt"):
        assert choose_start(settings_for(tmp_path, load_path=str(path)), tmp_path).step == 100
    elsewhere.mkdir()
    new.rename(elsewhere / new.name)
    assert choose_start(settings_for(tmp_path, load_path=str(old)), tmp_path) == Start(50, str(old))


def test_a_load_path_that_is_a_folder_is_said(tmp_path):
    with pytest.raises(UserError, match=r"`load_path`: .* is a folder: give the checkpoint in it"):
        choose_start(settings_for(tmp_path / "run", load_path=str(tmp_path)), tmp_path / "run")


def test_a_load_path_that_autoresume_passes_over_is_said(tmp_path, capsys):
    old, new = save(tmp_path, 50), save(tmp_path, 100)
    settings = settings_for(tmp_path, load_path=str(old), autoresume=True)
    assert choose_start(settings, tmp_path) == Start(100, str(new))
    assert "setting `load_path` is not used" in capsys.readouterr().err
    empty = settings_for(tmp_path / "new", load_path=str(old), autoresume=True)
    start = choose_start(empty, tmp_path / "new")
    assert (start.step, start.path, start.own) == (50, str(old), False)


@pytest.mark.parametrize("keep", [0, -2])
def test_at_least_one_checkpoint_is_kept(keep):
    with pytest.raises(UserError, match=f"`save_keep` is {keep}; it must be -1 or at least 1"):
        read_settings(Path("yamls/demo/base.yaml"), [f"save_keep={keep}"])


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
        "import sys; from pathlib import Path; from chimera.train.run.checkpoints import lock_folder\n"
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
    assert end_step("45000ba", 50000) == 45000
    assert end_step(None, 50000) == 50000
    for wrong in ("1ep", "60000ba", "many", "0ba"):
        with pytest.raises(UserError, match="max_duration"):
            end_step(wrong, 50000)


def test_the_lock_does_not_follow_the_folder_name_into_the_checkpoints(tmp_path):
    with lock_folder(tmp_path):
        assert find_checkpoints(tmp_path) == []
        assert os.listdir(tmp_path) == [".lock"]
