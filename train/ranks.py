"""Work that some ranks do while the others wait, for longer than a collective operation may take."""

import threading
from collections.abc import Callable
from typing import Any

from composer.utils import dist

from chimera.cli import UserError, one_line

PULSE = 1.0  # seconds between looks at the others


def together(work: Callable[[], Any] | None) -> list[Any]:
    """Run `work` on this rank (None: it only waits) until all ranks are done; what each returned, by rank.

    The ranks keep in touch meanwhile, so `dist_timeout` does not limit it. An error on one rank ends it on all: there
    it is raised as it is, on the others as the same `UserError`, or as a `RuntimeError` that names the rank.
    """
    done: dict[str, Any] = {}

    def run() -> None:
        try:
            done["result"] = work() if work else None
        except Exception as error:
            done["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while True:
        thread.join(PULSE)
        ended = not thread.is_alive()
        error = done.get("error")
        mistake = str(error) if isinstance(error, UserError) else None
        defect = f"{type(error).__name__}: {one_line(error)}" if error is not None else None
        states = dist.all_gather_object((ended, done.get("result"), mistake, defect))
        if error is not None:
            raise error
        for rank, (_, _, mistake, defect) in enumerate(states):
            if defect is not None:
                raise UserError(mistake) if mistake is not None else RuntimeError(f"rank {rank} failed: {defect}")
        if all(state[0] for state in states):
            return [state[1] for state in states]
