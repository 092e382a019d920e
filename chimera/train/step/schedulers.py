"""Learning rate over steps: warm-up, then stable-and-decay or cosine.

A multiplier of the peak, as a function of the step and the whole plan's length alone: stopping at a phase's end
(`max_duration`) or resuming changes nothing. Warm-up–stable–decay: Hu et al., "MiniCPM", 2024; cosine: Loshchilov
and Hutter, "SGDR", 2017; a decay of the shape 1 - sqrt, steep at first: Hägele et al., "Scaling Laws and
Compute-Optimal Training Beyond Fixed Training Durations", 2024.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from chimera.cli import UserError

if TYPE_CHECKING:
    from chimera.train.settings import SchedulerSettings


def check_scheduler(settings: "SchedulerSettings", steps: int) -> None:
    """Raise `UserError` where warm-up and decay do not fit into a plan of `steps`."""
    if settings.warmup_steps + (settings.decay_steps if settings.name == "wsd" else 0) > steps:
        raise UserError(
            f"setting `scheduler`: warmup_steps {settings.warmup_steps} and decay_steps {settings.decay_steps} "
            f"do not fit into {steps} steps"
        )


def jump(was: Mapping[str, Any], settings: "SchedulerSettings", peak: float, steps: int, step: int) -> str | None:
    """What is said of a learning rate that goes up where a run is taken up again, None where it does not.

    A plan that is lengthened when its decay was done, or under way, begins the decay anew: the rate leaps to the peak.

    Args:
        was: the schedule that the checkpoint was trained with: its settings, its `peak` and the plan's `steps`.
        peak: of the learning rate from here on.
        steps: of the plan from here on.
        step: the first to come.
    """
    options = type(settings)(**{key: value for key, value in was.items() if key not in ("peak", "steps")})
    last = was["peak"] * multiplier(options, was["steps"], step - 1)
    first = peak * multiplier(settings, steps, step)
    due = was["peak"] * multiplier(options, was["steps"], step) if step < was["steps"] else last  # warm-up goes up too
    if first <= 1.01 * max(last, due):
        return None
    begin = options.warmup_steps if options.name == "cosine" else was["steps"] - options.decay_steps
    words = f"the learning rate jumps from {last:.3g} at step {step - 1} to {first:.3g} at step {step}"
    if options.name == "constant" or begin >= step:
        return f"{words}: if it should not, set `optimizer.lr` and `scheduler` back"
    return (
        f"{words}: the checkpoint is {step - begin} steps into a decay that this plan puts later, and such a jump "
        f"undoes it: to train longer, `branch` from the checkpoint of step {begin} or earlier, with a `run_name` and "
        "`save_folder` of its own"
    )


def multiplier(settings: "SchedulerSettings", steps: int, step: int) -> float:
    """Share of the peak learning rate that step `step` of `steps` trains with."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.name == "constant":
        return 1.0
    start = settings.warmup_steps if settings.name == "cosine" else steps - settings.decay_steps
    if step < start:
        return 1.0
    way = (step - start) / (steps - 1 - start) if start < steps - 1 else 1.0  # a decay of one step is at the end
    shape = "cosine" if settings.name == "cosine" else settings.decay
    if shape == "cosine":
        way = (1 - math.cos(math.pi * way)) / 2
    elif shape == "sqrt":
        way = math.sqrt(way)
    return 1.0 - (1.0 - settings.final) * way
