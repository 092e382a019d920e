"""Builds on a Ray cluster of two nodes on this machine, one of which dies."""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from chimera.cli import UserError
from chimera.convert.build import part_state
from chimera.convert.build.executor import Event, Task
from chimera.convert.build.ray_executor import RayExecutor
from chimera.convert.settings import BuildSettings
from tests.convert import builds

PART = 500_000  # bytes: about a second, that no part ends while its node dies
PATIENCE = 240  # seconds for a worker of Ray's to begin: it imports for long where the machine is busy


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
    for i in range(2, 100):
        shutil.copy(folder / "in" / "0.parquet", folder / "in" / f"{i}.parquet")
    builds.build_here(builds.config(folder / "in", folder / "out", part_bytes=PART))
    return folder / "in", builds.tree(folder / "out")


def test_a_build_on_two_nodes_one_of_them_killed_writes_the_same_bytes(
    cluster: Any, wanted: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    sources, tree = wanted
    second = cluster.add_node(num_cpus=2, object_store_memory=80 << 20)
    settings = builds.config(
        sources, tmp_path / "out", engine="ray", ray_address=cluster.address, workers="auto", part_bytes=PART
    )
    process = builds.start(settings, tmp_path)
    killed: list[str] = []

    def kill_the_second_node() -> None:
        work = tmp_path / "out" / ".work"
        while process.poll() is None and not killed:
            begun = list(work.glob("parts-*/columns/*"))
            for _ in range(2):  # those still going on when all were looked at are under way at once
                begun = [f for f in begun if f.is_dir() and not part_state.load(f).done]
            if len(begun) >= 2:  # the first node works on one part at a time
                workers = psutil.Process(second.all_processes["raylet"][0].process.pid).children()
                cluster.remove_node(second, allow_graceful=False)
                for worker in workers:  # they would end the task at hand before they notice
                    with contextlib.suppress(psutil.NoSuchProcess):
                        worker.kill()
                killed.append(str(begun[0]))

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


def _broken(*_: Any) -> None:
    raise ImportError("no module named xyz")


def _dead(*_: Any) -> None:
    os._exit(1)


def _writing(work: Path, *_: Any) -> None:
    """Writes what the time is until it is stopped."""
    while True:
        (work / "now").write_text(str(time.time()))
        time.sleep(0.01)


def _executor(cluster: Any, work: Path, task: Any, stopping: float = 60.0) -> RayExecutor:
    return RayExecutor(BuildSettings(ray_address=cluster.address), work, stopping, task)


def _ended(executor: RayExecutor) -> Event:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if events := executor.wait(1):
            return events[0]
    raise AssertionError("nothing happened")


def test_what_no_other_node_would_mend_fails_and_a_dead_worker_is_lost(cluster: Any, tmp_path: Path) -> None:
    for task, kind, text in ((_broken, "failed", "no module named xyz"), (_dead, "lost", "WorkerCrashedError: ")):
        with _executor(cluster, tmp_path, task) as executor:
            executor.start(Task("s", 0, None))
            event = _ended(executor)
        assert event.kind == kind
        assert text in str(event.payload)


def test_once_an_executor_is_closed_no_cancelled_part_writes(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task("s", 0, None)
    with monkeypatch.context() as patch, _executor(cluster, tmp_path, _writing) as executor:
        patch.setattr(ray, "shutdown", lambda: None)  # which would end the part, too
        executor.start(task)
        until = time.monotonic() + PATIENCE
        while not (tmp_path / "now").exists() and time.monotonic() < until:
            time.sleep(0.1)
        executor.cancel(task)
    said = (tmp_path / "now").read_text()
    time.sleep(0.3)
    assert (tmp_path / "now").read_text() == said
    ray.shutdown()
    executor = _executor(cluster, tmp_path, _writing, stopping=0.0).__enter__()
    executor.start(task)
    executor.cancel(task)
    with pytest.raises(UserError, match="did not stop on its node in 0 s"):
        executor.close()
