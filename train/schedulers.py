"""Learning rate over steps: warm-up, then stable-and-decay or cosine.

A multiplier of the peak, as a function of the step and the whole plan's length alone: stopping at a phase's end
(`max_duration`) or resuming changes nothing. Warm-up–stable–decay: Hu et al., "MiniCPM", 2024; cosine: Loshchilov
and Hutter, "SGDR", 2017.
"""

import math

from chimera.cli import UserError
from train.settings import SchedulerSettings


def check_scheduler(settings: SchedulerSettings, steps: int) -> None:
    """Raise `UserError` where warm-up and decay do not fit into a plan of `steps`."""
    if settings.warmup_steps + (settings.decay_steps if settings.name == "wsd" else 0) > steps:
        raise UserError(
            f"setting `scheduler`: warmup_steps {settings.warmup_steps} and decay_steps {settings.decay_steps} "
            f"do not fit into {steps} steps"
        )


def multiplier(settings: SchedulerSettings, steps: int, step: int) -> float:
    """Share of the peak learning rate that step `step` of `steps` trains with."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.name == "constant":
        return 1.0
    start = settings.warmup_steps if settings.name == "cosine" else steps - settings.decay_steps
    if step < start:
        return 1.0
    way = (step - start) / (steps - 1 - start) if start < steps - 1 else 1.0  # a decay of one step is at the end
    if settings.name == "cosine":
        way = (1 - math.cos(math.pi * way)) / 2
    return 1.0 - (1.0 - settings.final) * way
