"""Line charts as inline SVG, drawn by matplotlib: small, legible in light and dark, for a column 420 units wide.

Colors are CSS variables (`--s0` to `--s7`, `--ink`, `--soft`, `--grid`) that the page defines for both schemes; fonts
and their size are the page's too.
"""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chimera.text import amount, html, one_line

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 18, 26
POINTS = 240  # of a line; longer ones are averaged in buckets
COLORS = 8
# Matplotlib knows no variables: it draws with a color that stands for each.
LINES = [f"#0000{number:02x}" for number in range(COLORS)]
INK, SOFT, GRID = "#0000a0", "#0000a1", "#0000a2"
VARIABLES = {INK: "--ink", SOFT: "--soft", GRID: "--grid"} | {color: f"--s{n}" for n, color in enumerate(LINES)}
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "the same names every time", "text.parse_math": False}
ROUND = [1, 2, 2.5, 5, 10]  # steps between ticks, times powers of ten


@dataclass(frozen=True)
class Line:
    """A line of a chart: values at steps, [n] each."""

    name: str
    steps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    color: int
    dashed: bool = False  # a planned value
    stairs: bool = False  # holds from each step to the next
    faint: bool = False  # of every step: thinned to each bucket's lowest and highest value, so that a spike stays
    extremes: bool = False  # thinned to each bucket's value farthest from 0 rather than to its mean


def chart(
    label: str,
    lines: Sequence[Line],
    steps: int,
    show: Callable[[float], str] | None,
    bounds: tuple[float, float] | None = None,
    cuts: Sequence[tuple[int, str]] = (),
    marks: Sequence[tuple[int, str]] = (),
    ticks: Sequence[float] = (),
) -> str:
    """An SVG element.

    Args:
        label: what it shows, for screen readers.
        steps: the x axis goes from 0 to here.
        show: how a value of the y axis is written; None: with the decimals that tell its ticks apart.
        bounds: of the y axis; None: of the values.
        cuts: (step, name) of vertical lines with a name, such as phases.
        marks: (step, title) of triangles on the x axis, such as resumes.
        ticks: of the y axis; none: round numbers.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

    out, inner = io.StringIO(), HEIGHT - TOP - BOTTOM
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters its own fonts lack: the page's are used
        figure = Figure((WIDTH / 72, HEIGHT / 72))
        axes = figure.add_axes((LEFT / WIDTH, BOTTOM / HEIGHT, 1 - (LEFT + RIGHT) / WIDTH, inner / HEIGHT))
        axes.set(xlim=(0, max(1, steps)), axisbelow=True)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelcolor=SOFT)
        axes.tick_params("x", pad=9)
        axes.grid(axis="y", color=GRID, linewidth=1)
        for number, line in enumerate(lines):
            _draw(line, axes, f"title {number}")
        for step, name in cuts:
            axes.axvline(step, ymax=1 + 12 / inner, color=SOFT, linewidth=1, clip_on=False)
            place: Any = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
            axes.annotate(one_line(name), (step, 1), (4, 5), color=INK, annotation_clip=False, **place)
        for number, (step, _) in enumerate(marks, len(lines)):
            mark: Any = {"color": INK, "markersize": 7, "markeredgewidth": 0, "clip_on": False}
            axes.plot(step, -4 / inner, "^", transform=axes.get_xaxis_transform(), gid=f"title {number}", **mark)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=ROUND))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)) if show else ScalarFormatter(False))
        axes.set(ylim=bounds, **({"yticks": ticks} if ticks else {}))
        figure.savefig(out, format="svg", transparent=True)
    return _inline(out.getvalue(), label, [*(line.name for line in lines), *(title for _, title in marks)])


def legend(lines: Sequence[Line]) -> str:
    """An HTML list of the lines, each name once."""
    seen = {line.name: line for line in reversed(lines) if not line.faint}
    items = [
        f'<li><i class="{"dash" if line.dashed else ""}" style="--c:var(--s{line.color % COLORS})"></i>'
        f"{html(line.name)}</li>"
        for line in reversed(seen.values())
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _draw(line: Line, axes: Any, gid: str) -> None:
    steps, values = (line.steps, line.values) if line.stairs else _thin(line)
    style: dict[str, Any] = {"color": LINES[line.color % COLORS], "linewidth": 2}
    if line.faint:
        style |= {"linewidth": 1, "alpha": 0.45}
    elif line.extremes:
        style |= {"linewidth": 1, "alpha": 0.8}
    elif line.dashed:
        style |= {"color": INK, "linewidth": 1.4, "dashes": (3, 3)}
    if len(steps) == 1:
        style |= {"marker": "o", "markersize": 2}
    axes.plot(steps, values, drawstyle="steps-post" if line.stairs else None, gid=gid, **style)


def _inline(svg: str, label: str, titles: Sequence[str]) -> str:
    """A file of matplotlib's as an element of a page, which may hold several; `titles` show under the pointer."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    frame = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html(label)}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: frame, svg, count=1)
    svg = re.sub(r'<g id="title (\d+)">', lambda found: f"<g><title>{html(titles[int(found[1])])}</title>", svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r'style="[^"]*"', lambda found: _of_the_page(found[0]), svg)
    return re.sub(r"\s*\n\s*", "\n", svg)


def _of_the_page(style: str) -> str:
    """The style of an element with the page's fonts and colors."""
    style = re.sub(r'font: [^;"]*;', "", style)
    return re.sub(r"#0000[0a]\d", lambda found: f"var({VARIABLES.get(found[0])})", style)


def _thin(line: Line) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """At most `POINTS` points, or pairs of them: means of buckets of neighbors, or their extremes."""
    if len(line.steps) <= POINTS:
        return line.steps.astype(float), line.values
    starts = np.linspace(0, len(line.steps), POINTS, endpoint=False).astype(int)
    buckets = np.split(np.arange(len(line.steps)), starts[1:])
    if line.faint:
        ends = [(bucket[line.values[bucket].argmin()], bucket[line.values[bucket].argmax()]) for bucket in buckets]
        places = np.unique(ends)  # in order of steps
        return line.steps[places].astype(float), line.values[places]
    if line.extremes:
        farthest = np.array([bucket[np.abs(line.values[bucket]).argmax()] for bucket in buckets])
        return line.steps[farthest].astype(float), line.values[farthest]
    counts = np.diff([*starts, len(line.steps)])
    return np.add.reduceat(line.steps, starts) / counts, np.add.reduceat(line.values, starts) / counts
