"""Which part runs next, until every stream has what it needs: limits, lost workers, stalled sources, progress.

Without `max_tokens` all parts of a stream are wanted whole. With it a part is wanted only as far as the parts before
it leave tokens: parts run ahead with what is certainly enough, and one that took too much is done anew with the
exact number, so the result does not depend on who ran when.
"""

import json
import time
from contextlib import suppress
from heapq import heapify, heappop, heappush
from pathlib import Path

from chimera.cli import UserError, say
from chimera.convert.build import part_state
from chimera.convert.build.executor import CRASHED, Event, Executor, Task
from chimera.convert.build.last_rows import begun
from chimera.convert.build.part_lock import at_work
from chimera.convert.build.part_state import PartState, fits
from chimera.convert.build.plan import StreamPlan
from chimera.convert.build.stream_bar import StreamBar
from chimera.files import write_whole

LONGEST_WAIT = 10.0  # seconds: a signal that comes in the moment before a wait is heard after it
START = "start.json"  # in the work folder: where each stream was when the builder started, and by its time, when
AGAIN = 3.0  # seconds until a part that another process is at is looked at again
MAX_LOSSES = 3  # times in a row one part may lose its worker without a commit in between


def started(work: Path) -> str | None:
    """The id of the plan whose parts a builder has begun to take."""
    with suppress(FileNotFoundError):
        return str(json.loads((work / START).read_bytes())["build"])
    return None


class StreamRun:
    """The state of one stream's parts. Once `finished`, `accepted` are those that make up the stream, in order."""

    def __init__(self, plan: StreamPlan, work: Path) -> None:
        self.plan, self._work = plan, work
        self._budget = plan.settings.max_tokens
        self.accepted: list[PartState] = []
        self._tokens = 0  # of the train split in the accepted parts
        self._done: dict[int, PartState] = {}  # parts that ended but wait for those before them
        self._failed: dict[int, UserError] = {}  # parts ahead that failed, and may turn out not to be wanted
        self._running: set[int] = set()
        self._busy: dict[int, float] = {}  # parts that another process is at, and when to look again
        plan.part_folder(work, 0).parent.mkdir(parents=True, exist_ok=True)  # which no worker makes anew
        found = [self.committed(index) for index in range(len(plan.parts))]
        self.bar = StreamBar(plan, found)
        self._done.update({index: state for index, state in enumerate(found) if state.done})
        self._open = [index for index, state in enumerate(found) if not state.done]  # a heap of those to start
        self._settle()

    @property
    def finished(self) -> bool:
        return len(self.accepted) == len(self.plan.parts) or self._left == 0

    @property
    def _left(self) -> int | None:
        """Train tokens the parts after the accepted ones may add; `None`: any number."""
        return None if self._budget is None else max(0, self._budget - self._tokens)

    @property
    def waits(self) -> bool:
        """Whether parts are wanted that another process is at."""
        return bool(self._busy) and not self.finished

    def urgency(self) -> int | None:
        """The priority of this stream's next part (0: the highest), or `None` when none is to be started.

        A stream's first part is wanted for certain, and so are all where no limit is set; of a limited stream the
        parts ahead may turn out to be too many, the more so the more of them run.
        """
        if self.finished or not self._open:
            return None
        first = self._open[0] == len(self.accepted)
        return 0 if first else 1 if self._budget is None else 1 + len(self._running)

    def next_task(self) -> Task | None:
        """The next part, from now on running; `None` where another process has done it meanwhile."""
        index = heappop(self._open)
        state = self.committed(index)
        if state.done and fits(state, self._left):
            self.done(index)
            return None
        self._running.add(index)
        self.bar.at(index, state if fits(state, self._left) else PartState())  # what it goes on from
        return Task(self.plan.name, index, self._left, self.plan.build)

    def committed(self, index: int) -> PartState:
        """The state of a part at its last commit."""
        return part_state.load(self.plan.part_folder(self._work, index))

    def done(self, index: int) -> None:
        self._running.discard(index)
        self._done[index] = state = self.committed(index)
        self.bar.at(index, state)
        self._settle()

    def failed(self, index: int, error: Exception) -> None:
        """Raise what ended a part: at once or, in a part that ran ahead of a limit, when that part is wanted."""
        if self._budget is None or not isinstance(error, UserError):
            raise error
        if index != len(self.accepted):
            say(f"{self.plan.name}: part {index} failed, which counts only if the stream comes to it: {error}")
        self._running.discard(index)
        self._failed[index] = error
        self._settle()

    def lost(self, index: int) -> None:
        self._running.discard(index)
        heappush(self._open, index)

    def busy(self, index: int) -> None:
        """Pass a part over that another process is at, until `look_again` finds it done or let go."""
        self._running.discard(index)
        self._busy[index] = time.monotonic() + AGAIN

    def look_again(self) -> None:
        """See what became of parts that other processes were at."""
        now = time.monotonic()
        for index in [index for index, due in self._busy.items() if due <= now]:
            if at_work(self.plan.part_folder(self._work, index)):
                self.bar.at(index, self.committed(index))
                self._busy[index] = now + AGAIN
            else:
                del self._busy[index]
                heappush(self._open, index)

    def _settle(self) -> None:
        """Accept ended parts in order, as far as they hold what is wanted of them.

        Raises the `UserError` of the next part where that has failed.
        """
        while self._left != 0 and len(self.accepted) in self._done:
            state = self._done.pop(len(self.accepted))
            if not fits(state, self._left):
                heappush(self._open, len(self.accepted))  # to be done anew
                return
            self.accepted.append(state)
            self._tokens += state.splits["train"].tokens
            self.bar.accept()
        if not self.finished and (error := self._failed.get(len(self.accepted))):
            raise error


class Dispatcher:
    """Runs the parts of all streams on an executor."""

    def __init__(self, streams: dict[str, StreamPlan], work: Path, stall_after: float) -> None:
        self.runs = {name: StreamRun(plan, work) for name, plan in streams.items()}
        self._work, self._stall_after = work, stall_after
        self._heard: dict[Task, float] = {}  # running tasks, when each last moved
        self._losses: dict[tuple[str, int], tuple[int, PartState]] = {}  # in a row, at the same commit
        self._said = False  # that other processes are at parts
        places = {name: run.bar.place() for name, run in self.runs.items()}
        build = next((run.plan.build for run in self.runs.values()), "")
        write_whole(work / START, json.dumps({"build": build, "streams": places}).encode())

    def run(self, executor: Executor) -> dict[str, list[PartState]]:
        """The states of each stream's parts once all are done.

        Raises `UserError` when a source or the disk fails or a part loses its worker again and again.
        """
        try:
            while True:
                self._fill(executor)
                if not self._heard:
                    if not any(run.waits for run in self.runs.values()):
                        break
                    time.sleep(AGAIN)  # all that is left is done elsewhere
                    continue
                patience = min(self._heard.values()) + self._stall_after - time.monotonic()
                for event in executor.wait(min(max(0.0, patience), LONGEST_WAIT)):
                    if event.task in self._heard:
                        self._handle(executor, event)
                self._name_stalled()
        finally:
            for run in self.runs.values():
                run.bar.close()
        if unfinished := [name for name, run in self.runs.items() if not run.finished]:
            raise RuntimeError(f"parts of {', '.join(unfinished)} were not run")
        return {name: run.accepted for name, run in self.runs.items()}

    def _fill(self, executor: Executor) -> None:
        for run in self.runs.values():
            run.look_again()
        if len(self._heard) >= executor.slots:
            return
        runs = list(self.runs.values())
        asked = [(run.urgency(), number) for number, run in enumerate(runs)]  # once: a start changes its stream's alone
        waiting = [(urgency, number) for urgency, number in asked if urgency is not None]
        heapify(waiting)
        while waiting and len(self._heard) < executor.slots:
            _, number = heappop(waiting)
            task = runs[number].next_task()
            if task:
                executor.start(task)
                self._heard[task] = time.monotonic()
            if (urgency := runs[number].urgency()) is not None:
                heappush(waiting, (urgency, number))

    def _handle(self, executor: Executor, event: Event) -> None:
        task, run = event.task, self.runs[event.task.stream]
        if event.kind == "progress":
            self._heard[task] = time.monotonic()
            run.bar.moved(task.part, event.payload)
            return
        del self._heard[task]
        if event.kind == "busy":
            run.busy(task.part)
            if not self._said:
                say(f"{task.stream}: another process is at part {task.part}: such parts are passed over meanwhile")
            self._said = True
            return
        if event.kind == "failed":
            run.failed(task.part, event.payload)
            return
        if event.kind == "done":
            run.done(task.part)
            if run.finished:  # `max_tokens` is reached: parts that ran ahead are not needed
                for ahead in [t for t in self._heard if t.stream == task.stream]:
                    executor.cancel(ahead)
                    del self._heard[ahead]
            return
        run.lost(task.part)
        state = run.committed(task.part)
        before, at = self._losses.get((task.stream, task.part), (0, state))
        losses = before + 1 if state == at else 1
        self._losses[task.stream, task.part] = losses, state
        where = f"{task.stream}: the worker of part {task.part} ({run.plan.parts[task.part].spans[0].file}) is gone"
        if losses == MAX_LOSSES:
            remedy = "give it more memory or fewer `workers`"
            if event.payload.startswith(CRASHED):
                rows = begun(run.plan.part_folder(self._work, task.part))
                remedy = f"it was at {rows}, or just behind: take what a library crashes on out of there, or {remedy}"
            raise UserError(
                f"{where}, {losses} times without a step ahead: {event.payload}: {remedy}, then run the same command "
                "again; it goes on where it stopped"
            )
        say(f"{where}: {event.payload}; another goes on from its last shard")

    def _name_stalled(self) -> None:
        now = time.monotonic()
        for task, heard in self._heard.items():
            if now - heard >= self._stall_after:
                file = self.runs[task.stream].plan.parts[task.part].spans[0].file
                where = f"part {task.part} ({file})"
                say(f"{task.stream}: stalled: no row from {where} for {self._stall_after:g} s; waiting")
                self._heard[task] = now
