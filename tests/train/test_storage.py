"""Where checkpoints go: a disk that fills up, and an object store."""

import os
import subprocess
from pathlib import Path

import pytest

from chimera.cli import UserError
from tests.convert.s3_server import S3Server
from tests.train.conftest import steps_of, weights_of
from train.main import main


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


@pytest.mark.usefixtures("s3")
def test_checkpoints_in_an_object_store_resume_past_a_damaged_one(overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(overrides("whole", "max_duration=20ba"))
    remote = [*overrides("unused"), "save_folder=s3://bucket/runs/a", "run_name=a"]
    main([*remote, "max_duration=10ba"])
    stored = tmp_path / "s3" / "bucket" / "runs" / "a"
    assert {"ep0-ba5-rank0.pt", "ep0-ba10-rank0.pt"} <= {path.name for path in stored.iterdir()}
    assert {"steps.jsonl", "config.json"} <= {path.name for path in stored.iterdir()}

    newest = stored / "ep0-ba10-rank0.pt"
    newest.write_bytes(newest.read_bytes()[:10_000])
    subprocess.run(["rm", "-rf", "runs"], check=True)  # another machine: nothing local is left
    main([*remote, "max_duration=20ba"])
    assert "ep0-ba10-rank0.pt of s3://bucket/runs/a is damaged" in capsys.readouterr().err
    assert steps_of(Path("runs/a")) == steps_of(tmp_path / "whole")
    (tmp_path / "end").mkdir()
    (stored / "ep0-ba20-rank0.pt").rename(tmp_path / "end" / "ep0-ba20-rank0.pt")
    ours, theirs = weights_of(tmp_path / "end", 20), weights_of(tmp_path / "whole", 20)
    assert all((ours[name] == theirs[name]).all() for name in theirs)
