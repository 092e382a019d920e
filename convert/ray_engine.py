"""Parts as tasks of a Ray cluster: the same part function, many machines.

The nodes need this package (or the checkout at the same path) and must see the work folder and the sources, by a
shared file system or because they are remote. A node that dies costs its parts what they did since their last commit.
"""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chimera.cli import UserError, one_line
from convert.engine import Event, Task, failure
from convert.part import Progress, run_part
from convert.settings import BuildSettings

STOPPING = 60.0  # seconds cancelled tasks get to end


class RayEngine:
    """Tasks of one CPU each; their progress comes through an actor on the builder's own node."""

    def __init__(self, settings: BuildSettings, work: Path) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("engine: ray is not installed: `pip install 'chimera-mix[ray]'`") from None
        self._ray, self._work = ray, work
        _reachable(settings.ray_address)
        checkout = str(Path(__file__).resolve().parents[1])
        paths = [checkout, *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            ray.init(
                address=settings.ray_address,
                runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
                logging_level="error",
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"ray_address: no Ray cluster at {settings.ray_address}: {error}") from None
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.slots = cpus if settings.workers == "auto" else int(settings.workers)
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self._mail = ray.remote(num_cpus=0, scheduling_strategy=here)(_Mail).remote()
        self._task = ray.remote(num_cpus=1, max_retries=0)(_run)
        self._running: dict[Any, Task] = {}
        self._cancelled: list[Any] = []

    def start(self, task: Task) -> None:
        self._running[self._task.remote(self._work, task, self._mail)] = task

    def wait(self, seconds: float) -> list[Event]:
        ended, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=min(seconds, 0.2))
        events = [Event("progress", task, moved) for task, moved in self._ray.get(self._mail.take.remote())]
        for ref in ended:
            task = self._running.pop(ref)
            try:
                error = self._ray.get(ref)
            except self._ray.exceptions.RuntimeEnvSetupError as broken:
                error = UserError(f"engine: ray: a node cannot set up its workers: {_say(broken)}")
            except self._ray.exceptions.RayTaskError as broken:  # `_run` catches what a part raises: it never ran
                error = RuntimeError(f"a node cannot run parts (is the same version installed there?): {broken}")
            except self._ray.exceptions.RayError as lost:
                events.append(Event("lost", task, f"{type(lost).__name__}: {_say(lost)}"))
                continue
            events.append(Event("done", task) if error is None else Event("failed", task, error))
        return events

    def cancel(self, task: Task) -> None:
        for ref in [ref for ref, running in self._running.items() if running == task]:
            self._ray.cancel(ref, force=True)  # only asks: `close` waits
            del self._running[ref]
            self._cancelled.append(ref)

    def close(self) -> None:
        mine = list(self._running)
        self._running = {}
        stopped = self._stop(self._cancelled)
        self._stop(mine)
        self._ray.shutdown()
        if not stopped:
            raise UserError(
                f"a part that is not needed any more did not stop on its node in {STOPPING:g} s: run the same command "
                "again once the node is back or gone"
            )

    def _stop(self, tasks: list[Any]) -> bool:
        """Cancel tasks until all have ended, or `STOPPING` is over."""
        until = time.monotonic() + STOPPING
        while tasks and time.monotonic() < until:
            for ref in tasks:
                self._ray.cancel(ref, force=True)
            _, tasks = self._ray.wait(tasks, num_returns=len(tasks), timeout=1.0)
        return not tasks


def _say(error: BaseException) -> str:
    return one_line(error)[:300]


def _reachable(address: str | None) -> None:
    """Refuse an address nothing listens at; Ray itself would try for minutes without a word."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # `None` or `auto`: Ray looks for a cluster on this machine
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"ray_address: no Ray cluster at {address}: {error}") from None


class _Mail:
    """What running tasks report, until the builder takes it."""

    def __init__(self) -> None:
        self._moved: list[tuple[Task, Progress]] = []

    def put(self, task: Task, moved: Progress) -> None:
        self._moved.append((task, moved))

    def take(self) -> list[tuple[Task, Progress]]:
        moved, self._moved = self._moved, []
        return moved


def _run(work: Path, task: Task, mail: Any) -> Exception | None:
    """A part on some node; the exception that ended it, as one to raise in the builder."""
    report: Callable[[Progress], None] = lambda moved: mail.put.remote(task, moved)
    try:
        if not (work / "plan.json").exists():
            raise UserError(
                f"{work} is not there on node {os.uname().nodename}: set `work` to a folder all nodes share"
            )
        run_part(work, task.stream, task.part, task.limit, report)
    except Exception as error:
        return failure(error, work)
    return None
