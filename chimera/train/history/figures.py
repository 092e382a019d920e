"""The charts of a run's report, each a card of the page; empty where the run has nothing to show."""

from collections.abc import Callable, Sequence

import numpy as np

from chimera.text import amount, counted
from chimera.train.history.charts import Line, chart, legend
from chimera.train.history.runlog import Run


def figures(run: Run) -> str:
    """All of them."""
    return "".join([mix(run), _distance(run), _loss(run), _eval(run), _lengths(run), _speed(run)])


def ranks(start: dict[str, int]) -> str:
    """`1 rank`, `2 ranks`: on what a run was started."""
    return counted(start["ranks"], "rank")


def mix(run: Run, title: str = "Mix", steps: int | None = None, top: float | None = None) -> str:
    """The card of a run's mix; its axes go to `steps` and to the share `top`, by default to the plan's."""
    realised, planned = [], []
    for number, (phase, (first, end)) in enumerate(zip(run.plan.phases, run.phase_spans(), strict=True)):
        done, shares = run.shares(number)
        for index, stream in enumerate(run.plan.streams):
            share = float(phase.proportions.get(stream, 0))
            realised.append(Line(stream, done, shares[:, index], index))
            ends = np.array([first, end]), np.array([share, share])
            planned.append(Line("planned", *ends, index, dashed=True))
    lines = [*realised, *planned]
    note = "Share of the positions since the phase began, against the plan. Triangles: where the run was started."
    bounds = (0, min(1.0, (top or largest_share(run)) * 1.15))
    show = lambda value: f"{100 * value:.0f} %"
    return _figure(run, title, note, "share of each stream", lines, show, bounds, steps=steps)


def largest_share(run: Run) -> float:
    """The largest proportion of a stream in a phase of the plan."""
    return max([0.05, *(float(share) for phase in run.plan.phases for share in phase.proportions.values())])


def _distance(run: Run) -> str:
    lines = []
    for phase in range(len(run.plan.phases)):
        steps, away = run.distances(phase)
        lines += [Line(s, steps, away[:, i], i, extremes=True) for i, s in enumerate(run.plan.streams)]
    lanes = run.plan.lanes
    note = f"Blocks a stream has had too many or too few since the phase began: always less than {lanes}."
    label = "blocks each stream is away from its share"
    return _figure(run, "Distance from the plan", note, label, lines, "{:g}".format, (-1.1 * lanes, 1.1 * lanes))


def _lengths(run: Run) -> str:
    segments = run.plan.segments
    steps = np.array([*(s.first_step for s in segments), run.plan.steps])
    values = np.array([*(s.seq_len for s in segments), segments[-1].seq_len], np.float64)
    lines = [Line("sequence length", steps, values, 0, stairs=True)]
    top = float(values.max()) * 1.1
    ticks = sorted({0.0, *values.tolist()})
    note = f"Positions a sequence; {_between([s.sequences_per_step * s.seq_len for s in segments])} positions a step."
    return _figure(run, "Sequence length", note, "sequence length", lines, "{:g}".format, (0, top), ticks, named=False)


def _between(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _loss(run: Run) -> str:
    note = "Mean over the trained tokens of each global batch. It jumps where the mix or the length changes."
    return _figure(run, "Training loss", note, "training loss", loss_lines(run, 0))


def loss_lines(run: Run, color: int, name: str | None = None) -> list[Line]:
    """The training loss: of each step, and where there are many its mean over some; `name` instead of what they are."""
    there = ~np.isnan(run.loss)  # the others had no token to train on
    steps, loss, weight = run.steps[there], run.loss[there], run.trained[there].astype(np.float64)
    window = max(1, len(loss) // 60)
    lines = [Line(name or "each step", steps, loss, color, faint=window > 1)]
    if window > 1:
        ones = np.ones(window)
        smooth = np.convolve(loss * weight, ones, "valid") / np.convolve(weight, ones, "valid")
        lines.append(Line(name or f"mean of {window} steps", steps[window - 1 :], smooth, color))
    return lines


def _eval(run: Run) -> str:
    if not run.evals:
        return ""
    longest = max(seq_len for _, seq_len in run.evals)
    lines = [
        Line(stream, *run.evals[stream, longest], index)
        for index, stream in enumerate([*run.plan.streams, *run.only_evaluated])
        if (stream, longest) in run.evals
    ]
    note = f"On its eval split, sequences of {longest} tokens."
    return _figure(run, "Loss of each stream", note, "eval loss", lines)


def _speed(run: Run) -> str:
    if not len(run.speed[0]):
        return ""
    lines = [Line("tokens a second", *run.speed, 2)]
    top = float(run.speed[1].max()) * 1.05
    note = "Tokens a second over all ranks."
    return _figure(run, "Throughput", note, "throughput", lines, amount, (0, top), named=False)


def _figure(
    run: Run,
    title: str,
    note: str,
    label: str,
    lines: Sequence[Line],
    show: Callable[[float], str] | None = None,
    bounds: tuple[float, float] | None = None,
    ticks: Sequence[float] = (),
    named: bool = True,
    steps: int | None = None,
) -> str:
    """A card with a chart over the run's steps, its phases and starts marked; `named`: with a legend.

    `label`, `lines`, `show`, `bounds` and `ticks` are those of `chart`; so is `steps`, by default the plan's.
    """
    cuts = [(first, phase.name) for phase, (first, _) in zip(run.plan.phases, run.phase_spans(), strict=True)]
    marks = [(s["from_step"], f"start at step {s['from_step']} on {ranks(s)}") for s in run.starts]
    if run.parent:
        marks.append((run.parent["step"], f"branch of {run.origin}"))
    svg = chart(f"{label} over steps", lines, steps or run.plan.steps, show, bounds, cuts, marks, ticks)
    return card(title, note, svg, lines if named else ())


def card(title: str, note: str, svg: str, named: Sequence[Line] = ()) -> str:
    """A chart with its title, a note and the names of lines; title and note are HTML."""
    return f"<section><h2>{title}</h2><p>{note}</p>{svg}{legend(named) if named else ''}</section>"
