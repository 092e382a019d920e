"""The page of two runs: their losses in one chart each, their mixes side by side, and what differs."""

from collections.abc import Callable, Sequence

from chimera.text import amount, html
from chimera.train.history.charts import Line, chart
from chimera.train.history.compare import Pair, shown
from chimera.train.history.figures import card, largest_share, loss_lines, mix
from chimera.train.history.page import frame, html_table
from chimera.train.history.runlog import Run

COLORS = (0, 1)  # of the two
MOST = 12  # streams with a chart of their own


def compare_page(pair: Pair, again: int | None = None) -> str:
    """The page; `again`: seconds after which a browser reads it again."""
    one, other = pair.names
    steps = max(run.plan.steps for run in pair.runs)
    top = max(map(largest_share, pair.runs))
    cards = [
        _loss(pair, steps),
        _speed(pair, steps),
        *(mix(run, f"Mix of {html(name)}", steps, top) for name, run in _named(pair)),
        *_evals(pair, steps),
    ]
    rows = [(key, shown(value), shown(theirs)) for key, value, theirs in pair.differences]
    losses, shares = (
        [f"{name}: {head}" for name in pair.names for head in heads]
        for heads in (("loss", "at its end"), ("planned", "realized"))
    )
    small = [
        html_table("The runs", ("", one, other), pair.totals()),
        html_table("What differs", ("", one, other), rows, "Settings, versions and indexes of shards."),
    ]
    wide = [
        html_table("Stages", ("stage", "steps", *losses), pair.stages(), "At its end: of its last tenth of steps.", 2),
        html_table("Mix", ("phase", "stream", *shares), pair.mix(), "Shares of the positions.", 2),
        html_table("Loss of each stream", ("stream", "length", one, other), pair.evals(), "The newest evaluation."),
    ]
    body = f'<div class="tiles">{_tiles(pair)}</div><div class="grid">{"".join(cards)}</div>'
    body += f'<div class="grid">{"".join(small)}</div><div class="grid rows">{"".join(wide)}</div>'
    note = "; ".join(html(sentence) for sentence in (*pair.left, pair.agreement))
    return frame(f"{html(one)} and {html(other)}", note, body, again)


def _tiles(pair: Pair) -> str:
    same = sum(same for _, same in pair.digests)
    tiles = [
        ("good" if pair.digests and pair.apart is None else "", f"{same:,} of {len(pair.digests):,}",
         "steps that both logged have the same batches"),
        ("", f"{pair.apart:,}" if pair.apart is not None else "none", "is the first step with other batches"),
        ("", str(len(pair.differences)), "settings, versions and shards differ"),
    ]  # fmt: skip
    return "".join(f'<div class="{kind}"><b>{value}</b><span>{label}</span></div>' for kind, value, label in tiles)


def _chart(
    pair: Pair,
    label: str,
    lines: Sequence[Line],
    steps: int,
    show: Callable[[float], str] | None = None,
    bounds: tuple[float, float] | None = None,
) -> str:
    """A chart with the phases of the first run, and the steps at which a branch began or batches began to differ."""
    first = pair.one
    cuts = [(begin, phase.name) for phase, (begin, _) in zip(first.plan.phases, first.phase_spans(), strict=True)]
    marks = [(run.parent["step"], f"{name} began") for name, run in _named(pair) if run.parent]
    if pair.apart is not None:
        marks.append((pair.apart, "the first step with other batches"))
    return chart(f"{label} over steps", lines, steps, show, bounds, cuts, marks)


def _named(pair: Pair) -> list[tuple[str, Run]]:
    return list(zip(pair.names, pair.runs, strict=True))


def _loss(pair: Pair, steps: int) -> str:
    lines = [
        line for color, (name, run) in zip(COLORS, _named(pair), strict=True) for line in loss_lines(run, color, name)
    ]
    note = (
        "Mean over the trained tokens of each global batch. Triangles: where a branch began, and where batches differ."
    )
    return card("Training loss", note, _chart(pair, "training loss", lines, steps), lines)


def _evals(pair: Pair, steps: int) -> list[str]:
    """A chart for each stream that both evaluated, at the longest length that both did."""
    cards: list[str] = []
    for stream in dict.fromkeys(stream for stream, _ in pair.one.evals):
        lengths = [length for name, length in pair.one.evals if name == stream and (stream, length) in pair.other.evals]
        if lengths and len(cards) < MOST:
            lines = [
                Line(name, *run.evals[stream, max(lengths)], color)
                for color, (name, run) in zip(COLORS, _named(pair), strict=True)
            ]
            note = f"On its eval split, sequences of {max(lengths)} tokens."
            cards.append(card(f"Loss of {html(stream)}", note, _chart(pair, "eval loss", lines, steps), lines))
    return cards


def _speed(pair: Pair, steps: int) -> str:
    lines = [
        Line(name, *run.speed, color)
        for color, (name, run) in zip(COLORS, _named(pair), strict=True)
        if len(run.speed[0])
    ]
    if not lines:
        return ""
    top = max(float(line.values.max()) for line in lines) * 1.05
    svg = _chart(pair, "throughput", lines, steps, show=amount, bounds=(0, top))
    return card("Throughput", "Tokens a second over all ranks.", svg, lines)
