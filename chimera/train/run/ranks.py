"""Coordination between ranks: the same config on all, and work that the others wait for."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from composer.utils import dist

import chimera
from chimera.cli import UserError
from chimera.config import leaves
from chimera.text import one_line
from chimera.train.data.shards import Shards
from chimera.train.order.schedule import Plan
from chimera.train.settings import TrainSettings

PULSE = 1.0  # seconds between looks at the others

# Settings that a node may have of its own: where things are, how data arrives, what rank 0 alone does.
OF_A_NODE = {
    *("shards", "cache", "cache_limit", "num_workers", "predownload", "tokenizer", "model.pretrained"),
    *("save_folder", "load_path", "branch", "loggers", "progress_bar", "dist_timeout"),
    *("tokens_per_second", "max_passes"),
}


def check_ranks_agree(settings: TrainSettings, shards: Shards, plan: Plan) -> None:
    """Raise `UserError` on all ranks unless they would train the same steps on the same blocks.

    Each reads its own config and shards: where a node's copy is an older one, its part of every step would be of
    another run, and nothing would show it.
    """
    if wrong := first_difference(dist.all_gather_object(what_must_agree(settings, shards, plan))):
        raise UserError(
            f"{wrong}: ranks that differ would train one model on two mixtures: give every node the same config, "
            "shards and program"
        )


def what_must_agree(settings: TrainSettings, shards: Shards, plan: Plan) -> dict[str, Any]:
    """What decides the steps and blocks of a rank, by its name in messages."""
    mine = {f"setting `{key}`": value for key, value in leaves(settings.model_dump()) if not _of_a_node(key)}
    mine |= {f"stream {name} at `shards`": (shards.streams[name].train.index or "")[:12] for name in plan.streams}
    mine["the shards' tokenizer"] = shards.tokenizer.digest[:12]
    mine["the version of chimera"] = chimera.__version__
    return mine


def _of_a_node(key: str) -> bool:
    return key in OF_A_NODE or key.partition(".")[0] in OF_A_NODE  # `shards` may be several


def first_difference(ranks: Sequence[Mapping[str, Any]]) -> str | None:
    """Where a rank's `what_must_agree` is not rank 0's, in words."""
    first = ranks[0]
    for rank, theirs in enumerate(ranks):
        for what in [*first, *(theirs.keys() - first.keys())]:
            if first.get(what) != theirs.get(what):
                return f"{what} is {theirs.get(what)} on rank {rank} and {first.get(what)} on rank 0"
    return None


def run_on_ranks(work: Callable[[], Any] | None) -> list[Any]:
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
