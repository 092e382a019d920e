"""A build by many processes that run the same command on a shared work folder, with no server (`engine: array`).

The one that gets the lock of the work folder is the builder: it plans, takes parts and publishes, as it does alone. The
others help: they take parts too. A part is whoever's that gets its lock, and one that is held is passed over. If the
builder is killed, its lock is free, and a helper goes on as the builder.

Helpers take no parts of streams with `max_tokens`: how much of such a part is wanted depends on those before it, which
the builder alone keeps. They remove nothing and publish nothing.
"""

import random
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from chimera.cli import progress, say
from chimera.convert.build import part_state
from chimera.convert.build.build import build
from chimera.convert.build.dispatch import AGAIN, started
from chimera.convert.build.executor import Event, Executor, LocalExecutor, Task
from chimera.convert.build.part_lock import at_work
from chimera.convert.build.plan import BuildPlan, load_plan
from chimera.convert.build.work_lock import LOCK, Locked, holder_of
from chimera.convert.settings import BuildSettings
from chimera.files import is_locked
from chimera.manifest import Manifest
from chimera.text import counted


def build_in_array(settings: BuildSettings) -> Manifest | None:
    """Build, or help another process that does; the manifest, or `None` of a helper for whom no part is left.

    Raises what `build` does, and `UserError` where a part fails here.
    """
    work = settings.work_folder
    while True:
        if not is_locked(work / LOCK):
            try:
                return build(settings, LocalExecutor(settings.worker_count, work))
            except Locked:  # another was faster
                time.sleep(random.uniform(0.1, AGAIN))
        plan = _planned(work)
        if plan is None:
            continue
        helper = Helper(plan, work)
        with LocalExecutor(settings.worker_count, work) as executor:
            if helper.run(executor):
                holder = holder_of(work)
                where = f"; {holder} goes on" if holder else ""
                say(f"no part is left for this process, which did {counted(helper.done, 'part')}{where}")
                return None


def _planned(work: Path) -> BuildPlan | None:
    """The plan, once its builder takes parts; `None` where there is no builder any more."""
    said = False
    while is_locked(work / LOCK):
        if plan := _plan(work):
            return plan
        if not said:
            say(f"waiting for the plan of {holder_of(work) or 'the builder'}")
            said = True
        time.sleep(AGAIN)
    return None


def _plan(work: Path) -> BuildPlan | None:
    with suppress(FileNotFoundError):
        plan = load_plan(work)
        if started(work) == plan.id:
            return plan
    return None


class Helper:
    """Takes parts of a plan until none is left; `done` are those that were done here."""

    def __init__(self, plan: BuildPlan, work: Path) -> None:
        self._plan, self._work = plan, work
        whole = [stream for stream in plan.streams.values() if stream.settings.max_tokens is None]
        parts = [Task(stream.name, index, None, plan.id) for stream in whole for index in range(len(stream.parts))]
        begin = random.randrange(len(parts) or 1)  # the builder takes them from the front
        self._open = deque([*parts[begin:], *parts[:begin]])
        self._busy: deque[tuple[float, Task]] = deque()  # when to look again at parts that others are at
        self._running: set[Task] = set()
        self._looked = time.monotonic()
        self.done = 0

    def run(self, executor: Executor) -> bool:
        """Whether no part is left; False where the plan has no builder any more.

        Raises `UserError` when the source or the disk fails a part here.
        """
        bar = progress(len(self._open), "part", "helping")
        try:
            while self._open or self._busy or self._running:
                if not self._has_builder():
                    return False
                self._fill(executor)
                bar.update(bar.total - len(self._open) - len(self._busy) - len(self._running) - bar.n)
                if not self._running:
                    time.sleep(AGAIN if self._busy else 0)
                    continue
                for event in executor.wait(AGAIN):
                    self._handle(event)
        finally:
            bar.close()
        return True

    def _has_builder(self) -> bool:
        """Whether a builder goes by the plan, as far as was to be seen some seconds ago."""
        now = time.monotonic()
        if now - self._looked < AGAIN:
            return True
        self._looked = now
        return self._has_plan() and is_locked(self._work / LOCK)

    def _has_plan(self) -> bool:
        found = _plan(self._work)
        return found is not None and found.id == self._plan.id

    def _fill(self, executor: Executor) -> None:
        now = time.monotonic()
        while self._busy and self._busy[0][0] <= now:
            self._open.append(self._busy.popleft()[1])
        while self._open and len(self._running) < executor.slots:
            task = self._open.popleft()
            folder = self._plan.streams[task.stream].part_folder(self._work, task.part)
            if part_state.load(folder).done:
                continue
            if at_work(folder):
                self._look_later(task)
            else:
                executor.start(task)
                self._running.add(task)

    def _look_later(self, task: Task) -> None:
        self._busy.append((time.monotonic() + AGAIN, task))

    def _handle(self, event: Event) -> None:
        if event.kind == "progress":
            return
        self._running.discard(event.task)
        if event.kind == "done":
            self.done += 1
        elif event.kind == "busy":
            self._look_later(event.task)
        elif event.kind == "lost":
            where = f"{event.task.stream}: the worker of part {event.task.part} is gone"
            say(f"{where}: {event.payload}; the part is left to the others")
        elif self._has_plan():
            raise event.payload
        else:
            self._look_later(event.task)  # nothing of what it was at is left: the next look sees why
