"""Builds on a Ray cluster of two nodes on this machine, one of which dies."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.convert import builds

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 80 << 20, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **memory})
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("wanted")
    builds.write_sources(folder / "in")
    builds.build_here(builds.config(folder / "in", folder / "out"))
    return folder / "in", builds.tree(folder / "out")


def test_a_build_on_two_nodes_one_of_them_killed_writes_the_same_bytes(
    cluster: Any, wanted: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    sources, tree = wanted
    second = cluster.add_node(num_cpus=2, object_store_memory=80 << 20)
    settings = builds.config(sources, tmp_path / "out", engine="ray", ray_address=cluster.address, workers="auto")
    process = builds.start(settings, tmp_path)
    killed: list[str] = []

    def kill_the_second_node() -> None:
        parts = tmp_path / "out" / ".work" / "parts"
        while process.poll() is None and not killed:
            states = list(parts.glob("*/*/state.npz"))
            if len(states) >= 2:
                cluster.remove_node(second, allow_graceful=False)
                killed.append(str(states[0]))

    watcher = threading.Thread(target=kill_the_second_node)
    watcher.start()
    said, _ = process.communicate(timeout=300)
    watcher.join()
    assert process.returncode == 0, said
    assert killed, said
    assert "is gone" in said
    assert builds.tree(tmp_path / "out") == tree


def test_a_cluster_that_is_not_there_is_one_clear_line(wanted: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    settings = builds.config(wanted[0], tmp_path / "out", engine="ray", ray_address="127.0.0.1:1")
    code, said = builds.run(settings, tmp_path)
    assert code == 2, said
    assert "error: ray_address: no Ray cluster at 127.0.0.1:1" in said
