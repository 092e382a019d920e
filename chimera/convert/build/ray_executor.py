"""Parts as tasks of a Ray cluster: the same part function, many machines.

The nodes need this package (or the checkout at the same path) and must see the work folder and the sources, by a
shared file system or because they are remote. A node that dies costs its parts what they did since their last commit.
"""

import os
import queue
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chimera.cli import UserError
from chimera.convert.build.executor import Event, Executor, Task, failure, seldom
from chimera.convert.build.part import Progress, run_part
from chimera.convert.build.part_lock import Busy
from chimera.convert.settings import BuildSettings
from chimera.text import one_line
from chimera.versions import install


class ProgressQueue:
    """What running tasks report, until the builder takes it. An actor of two threads, one of which may wait."""

    def __init__(self) -> None:
        self._moved: queue.SimpleQueue[tuple[Task, Progress]] = queue.SimpleQueue()

    def put(self, task: Task, moved: Progress) -> None:
        self._moved.put((task, moved))

    def take(self) -> list[tuple[Task, Progress]]:
        """What came since the last time; waits until there is some. One call at a time."""
        found = [self._moved.get()]
        while not self._moved.empty():
            found.append(self._moved.get())
        return found


def run_task(work: Path, task: Task, progress: Any) -> Exception | None:
    """A part on some node; the exception that ended it, as one to raise in the builder."""
    report = seldom(lambda moved: progress.put.remote(task, moved))
    try:
        if not (work / "plan.json").exists():
            raise UserError(
                f"{work} is not there on node {os.uname().nodename}: set `work` to a folder all nodes share"
            )
        run_part(work, task.stream, task.part, task.limit, report, task.build)
    except Busy as busy:
        return busy
    except Exception as error:
        return failure(error, work)
    return None


class RayExecutor(Executor):
    """Tasks of one CPU each; their progress comes through an actor on the builder's own node.

    The `with` block joins the cluster, or starts one. `stopping` is how many seconds cancelled tasks get to end.
    """

    def __init__(
        self, settings: BuildSettings, work: Path, stopping: float = 60.0, run: Callable[..., Any] = run_task
    ) -> None:
        self._settings, self._work, self._stopping, self._run = settings, work, stopping, run
        self._running: dict[Any, Task] = {}
        self._taking: Any = None  # what is asked of the queue
        self._cancelled: list[Any] = []

    def __enter__(self) -> "RayExecutor":
        settings = self._settings
        try:
            import ray
        except ImportError:
            raise UserError(f"engine: ray is not installed: {install('ray')}") from None
        self._ray = ray
        _reachable(settings.ray_address)
        checkout = str(Path(__file__).resolve().parents[3])
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
        actor = ray.remote(num_cpus=0, max_concurrency=2, scheduling_strategy=here)
        self._progress = actor(ProgressQueue).remote()
        self._task = ray.remote(num_cpus=1, max_retries=0)(self._run)
        return self

    def start(self, task: Task) -> None:
        self._running[self._task.remote(self._work, task, self._progress)] = task

    def wait(self, seconds: float) -> list[Event]:
        self._taking = self._taking or self._progress.take.remote()
        self._ray.wait([self._taking, *self._running], timeout=seconds)
        events: list[Event] = []
        if self._ray.wait([self._taking], timeout=0)[0]:
            events += [Event("progress", task, moved) for task, moved in self._ray.get(self._taking)]
            self._taking = None
        for ref in self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)[0]:
            task = self._running.pop(ref)
            try:
                error = self._ray.get(ref)
            except self._ray.exceptions.RuntimeEnvSetupError as broken:
                error = UserError(f"engine: ray: a node cannot set up its workers: {_say(broken)}")
            except self._ray.exceptions.RayTaskError as broken:  # `run_task` catches what a part raises: it never ran
                error = RuntimeError(f"a node cannot run parts (is the same version installed there?): {broken}")
            except self._ray.exceptions.RayError as lost:
                events.append(Event("lost", task, f"{type(lost).__name__}: {_say(lost)}"))
                continue
            kind = "done" if error is None else "busy" if isinstance(error, Busy) else "failed"
            events.append(Event(kind, task, error))
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
                f"a part that is not needed any more did not stop on its node in {self._stopping:g} s: run the same "
                "command again once the node is back or gone"
            )

    def _stop(self, tasks: list[Any]) -> bool:
        """Cancel tasks until all have ended, or `stopping` seconds are over."""
        until = time.monotonic() + self._stopping
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
