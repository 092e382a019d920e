"""Two launchers as two nodes: own /dev/shm, own temporary folder, one save folder - as a cluster gives them."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.conftest import ROOT, steps_of
from train.main import main

COMPOSER = Path(sys.executable).parent / "composer"


def isolated(folder: Path) -> list[str]:
    """A prefix that runs a command in a mount namespace with a /dev/shm of its own; skips where that is not allowed."""
    prefix = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not allowed here")
    folder.mkdir(exist_ok=True)
    return prefix


def launch_nodes(tmp_path: Path, config: list[str], ranks: int) -> None:
    """Train on two nodes of `ranks` ranks each, to the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for node in range(2):
        command = [
            *isolated(tmp_path / f"node{node}"),
            *(str(COMPOSER), "-n", str(ranks), "--world_size", str(2 * ranks), "--node_rank", str(node)),
            *("--base_rank", str(node * ranks), "--master_addr", "127.0.0.1", "--master_port", str(port)),
            *("train/main.py", *config, f"cache={tmp_path}/node{node}/cache"),
        ]
        environment = {**os.environ, "TMPDIR": str(tmp_path / f"node{node}")}
        nodes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    for process in nodes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output


def test_two_nodes_of_two_ranks_resume_and_train_as_one_rank_does(overrides, tmp_path):
    """One rank, then two nodes of two (over both stage changes), then one rank again (over the phase change)."""
    config = ["model.attention_dropout=0.0", "num_canonical_nodes=2"]
    main(overrides("one", *config))
    main(overrides("several", *config, "max_duration=5ba"))
    launch_nodes(tmp_path, overrides("several", *config, "max_duration=18ba"), ranks=2)
    main(overrides("several", *config))
    ours, theirs = steps_of(tmp_path / "several"), steps_of(tmp_path / "one")
    assert [line["digest"] for line in ours] == [line["digest"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
