"""The plan as a picture: mix and sequence length over steps, passes over each stream."""

from pathlib import Path

import numpy as np

from chimera.cli import UserError
from chimera.text import amount, one_line
from chimera.train.order.schedule import Plan

# Okabe & Ito's colors: distinct with any color vision, and in print
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999"]


def draw(plan: Plan, path: Path) -> None:
    """Write a PNG of `plan` to `path`; raises `UserError` if it cannot be written."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # a name is no formula
        _draw(plan, path)


def _draw(plan: Plan, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    edges = [0, *(segment.end_step for segment in plan.segments)]
    colors = [COLORS[i % len(COLORS)] for i in range(len(plan.streams))]
    figure = Figure((9, 8), layout="constrained")
    mix, length, total = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.4, 2])

    shares = np.array([[float(phase.proportions.get(n, 0)) for n in plan.streams] for phase in plan.phases])
    steps = [plan.phase_start(i) for i in range(len(plan.phases))] + [plan.steps]
    mix.stackplot(
        np.repeat(steps, 2)[1:-1], np.repeat(shares, 2, axis=0).T, labels=plan.streams, colors=colors, alpha=0.85
    )
    for phase, share, first, end in zip(plan.phases, shares, steps, steps[1:], strict=False):
        mix.text((first + end) / 2, 1.02, one_line(phase.name), ha="center", va="bottom", fontweight="bold")
        wide = (end - first) / plan.steps > 0.07
        for value, top in zip(share, np.cumsum(share), strict=True):
            if value >= 0.04 and wide:
                mix.text((first + end) / 2, top - value / 2, f"{value:.1%}", ha="center", va="center")
    for boundary in steps[1:-1]:
        mix.axvline(boundary, color="black", linewidth=0.8)
    mix.set(ylim=(0, 1), ylabel="share of tokens")
    mix.yaxis.set_major_formatter(PercentFormatter(1))

    length.step(edges, [*(s.seq_len for s in plan.segments), plan.segments[-1].seq_len], where="post", color="black")
    lengths = sorted({segment.seq_len for segment in plan.segments})
    length.set(ylabel="sequence length", yticks=lengths, ylim=(0, 1.15 * lengths[-1]))
    length.grid(axis="y", alpha=0.3)

    counts = [plan.blocks_before(edge) for edge in edges]
    for name, color in zip(plan.streams, colors, strict=True):
        total.plot(edges, [count[name] * plan.block_len for count in counts], color=color, linewidth=2, label=name)
    total.set(ylabel="tokens so far", xlabel="step", xlim=(0, plan.steps), ylim=(0, None))
    total.yaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
    total.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}".replace(",", "\u202f")))
    total.grid(alpha=0.3)
    figure.legend(*total.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: {error}") from None
