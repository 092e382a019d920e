"""Two launchers as two nodes: own /dev/shm, own temporary and working folder - as a cluster gives them."""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from chimera.commands.train import main
from chimera.train.run.run_store import run_folder
from tests.convert.s3_server import S3Server
from tests.train.conftest import ROOT, steps_of


def isolated(folder: Path) -> list[str]:
    """A prefix that runs a command in a mount namespace with a /dev/shm of its own; skips where that is not allowed."""
    prefix = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not allowed here")
    folder.mkdir(exist_ok=True)
    return prefix


def launch_nodes(composer: Path, tmp_path: Path, config: list[str], ranks: int) -> str:
    """Train on two nodes of `ranks` ranks each, to the end, in a working folder each; what the first said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes, folders = [], []
    for node in range(2):
        command = [
            *isolated(tmp_path / f"node{node}"),
            *(str(composer), "-n", str(ranks), "--world_size", str(2 * ranks), "--node_rank", str(node)),
            *("--base_rank", str(node * ranks), "--master_addr", "127.0.0.1", "--master_port", str(port)),
            *(str(ROOT / "train/main.py"), *config, f"cache={tmp_path}/node{node}/cache"),
        ]
        # A short path: sockets lie below it, and their names may have no more than 107 characters.
        folders.append(tempfile.mkdtemp(prefix="node"))
        environment = {**os.environ, "TMPDIR": folders[-1]}
        nodes.append(
            subprocess.Popen(
                command,
                cwd=tmp_path / f"node{node}",
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = []
    for process in nodes:
        said.append(process.communicate(timeout=300)[0])
        assert process.returncode == 0, said[-1]
    for folder in folders:
        shutil.rmtree(folder)
    return said[0]


def test_two_nodes_of_two_ranks_resume_and_train_as_one_rank_does(overrides, tmp_path, warm):
    """One rank, then two nodes of two (over both stage changes), then one rank again (over the phase change)."""
    config = ["model.attention_dropout=0.0", "num_canonical_nodes=2"]
    main(overrides("one", *config))
    main(overrides("several", *config, "max_duration=5ba"))
    launch_nodes(warm / "composer", tmp_path, overrides("several", *config, "max_duration=18ba"), ranks=2)
    main(overrides("several", *config))
    ours, theirs = steps_of(tmp_path / "several"), steps_of(tmp_path / "one")
    assert [line["digest"] for line in ours] == [line["digest"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_two_nodes_that_share_no_folder_resume_from_an_object_store(overrides, tmp_path, monkeypatch, warm):
    config = ["model.attention_dropout=0.0", "num_canonical_nodes=2"]
    main(overrides("one", *config, "max_duration=8ba"))
    remote = overrides("unused", *config, "save_folder=s3://bucket/run", "run_name=several", "dist_timeout=60")
    with S3Server(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        launch_nodes(warm / "composer", tmp_path, [*remote, "max_duration=6ba"], ranks=1)
        newest = tmp_path / "s3/bucket/run/ep0-ba6-rank0.pt"
        newest.write_bytes(newest.read_bytes()[:5000])
        said = launch_nodes(warm / "composer", tmp_path, [*remote, "max_duration=8ba"], ranks=1)
    assert "ep0-ba6-rank0.pt is damaged" in said
    assert "starting at step 5 of 8 from s3://bucket/run/ep0-ba5-rank0.pt" in said
    local = run_folder("several", "s3://bucket/run")
    ours, theirs = steps_of(tmp_path / "node0" / local), steps_of(tmp_path / "one")
    assert [line["digest"] for line in ours] == [line["digest"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert not [*tmp_path.glob("node*/runs/*/.fetched*")], "what was fetched to each node does not stay"
