"""What a report says of a run, as one object for JSON: the numbers of its page, none of them rounded."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from chimera.train.history.runlog import Run

LAST = 10  # steps that the newest loss is a mean of


def facts(run: Run, differing: Sequence[int], unchecked: str | None) -> dict[str, Any]:
    """A run as a JSON-able object; `differing` and `unchecked` are `compare_digests`' of it."""
    return {
        "run_name": run.settings.run_name,
        "save_folder": run.address,
        "parent": run.parent,
        "steps": run.plan.steps,
        "first": run.first,
        "done": run.done,
        "tokens": run.tokens,
        "positions": run.positions,
        "loss": last_loss(run),
        "starts": [{key: start[key] for key in ("from_step", "ranks")} for start in run.starts],
        "mix": [asdict(row) for row in run.mix()],
        "stages": [asdict(row) for row in run.stages()],
        "evals": [
            {"stream": stream, "seq_len": length, "step": int(steps[-1]), "loss": float(values[-1])}
            for (stream, length), (steps, values) in run.evals.items()
        ],
        "passes": [dict(zip(("stream", "blocks", "so_far", "at_the_end"), row, strict=True)) for row in run.passes()],
        "checkpoints": [{"step": step, "file": name, "bytes": held} for step, name, held in run.checkpoints],
        "missing": run.missing,
        "untrained": run.untrained,
        "manifest": run.about.get("manifest"),
        "digests": {
            "of_all": run.digest,
            "compared": 0 if unchecked is not None else len(run.digests),
            "differing": list(differing),
            "unchecked": unchecked,
        },
    }


def last_loss(run: Run) -> float | None:
    """Mean loss of the last steps, over their trained tokens."""
    return run.mean_loss(slice(-LAST, None)) if len(run.loss) else None
