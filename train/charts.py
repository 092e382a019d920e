"""Line charts as inline SVG: small, legible in light and dark, drawn for a column 420 units wide.

Colours are CSS variables (`--s0` to `--s7`, `--ink`, `--soft`, `--grid`) that the page defines for both schemes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 18, 26
POINTS = 240  # of a line; longer ones are averaged in buckets
COLOURS = 8


@dataclass(frozen=True)
class Line:
    """A line of a chart: values at steps, [n] each."""

    name: str
    steps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    colour: int
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
    values = np.concatenate([line.values for line in lines]) if lines else np.zeros(0)
    low, high = bounds or _bounds(values)
    ticks = ticks or _ticks(low, high, 5)
    show = show or _decimals(ticks)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(1, steps)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{escape(show(tick))}</text>')
    for tick in _ticks(0, steps, 4):
        anchor = "end" if x(tick) > WIDTH - 30 else "middle"
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 9}" text-anchor="{anchor}">{short(tick)}</text>')
    for step, name in cuts:
        parts.append(f'<path class="cut" d="M{x(step):.1f} {TOP - 12}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="name" x="{x(step) + 4:.1f}" y="{TOP - 5}">{escape(name)}</text>')
    parts += [_path(line, x, y) for line in lines]
    base = HEIGHT - BOTTOM
    for step, title in marks:
        at = f"M{x(step) - 4:.1f} {base + 7}h8l-4 -7z"
        parts.append(f'<path class="mark" d="{at}"><title>{escape(title)}</title></path>')
    return "".join([*parts, "</svg>"])


def legend(lines: Sequence[Line]) -> str:
    """An HTML list of the lines, each name once."""
    seen = {line.name: line for line in reversed(lines) if not line.faint}
    items = [
        f'<li><i class="{"dash" if line.dashed else ""}" style="--c:var(--s{line.colour % COLOURS})"></i>'
        f"{escape(line.name)}</li>"
        for line in reversed(seen.values())
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def short(number: float) -> str:
    """A count in few characters: 45000 → 45k, 450560000 → 451M."""
    number = float(f"{number:.3g}")  # first, as it may bring the next unit: 999.6 → 1k
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _path(line: Line, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    steps, values = _thin(line) if not line.stairs else (line.steps.astype(float), line.values)
    points = [f"{x(step):.1f} {y(value):.1f}" for step, value in zip(steps, values, strict=True)]
    if not points:
        return ""
    if line.stairs:
        path = points[0] + "".join(f"H{point.split()[0]}V{point.split()[1]}" for point in points[1:])
    else:
        path = "L".join(points)
    kinds = {"dashed": line.dashed, "faint": line.faint, "fine": line.extremes}
    names = " ".join(["line", *(kind for kind, is_one in kinds.items() if is_one)])
    if len(points) == 1:
        path += "h.1"  # a round cap makes it a dot
    return (
        f'<path class="{names}" style="stroke:var(--s{line.colour % COLOURS})" d="M{path}">'
        f"<title>{escape(line.name)}</title></path>"
    )


def _thin(line: Line) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """At most `POINTS` points, or pairs of them: means of buckets of neighbours, or their extremes."""
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


def _bounds(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return (low - room if low < 0 else max(0.0, low - room)), high + room


def _decimals(ticks: Sequence[float]) -> Callable[[float], str]:
    """Writes each of `ticks` exactly, and all of them with as many decimals."""
    digits = next((n for n in range(9) if all(abs(round(tick, n) - tick) < 1e-9 for tick in ticks)), 9)
    return f"{{:.{digits}f}}".format


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between `low` and `high`, at most `most`, at least two."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    unit = next(power * n for n in (1, 2, 2.5, 5, 10) if power * n >= rough * 0.999)
    first, last = math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9)
    ticks = [round(n * unit, 10) for n in range(first, last + 1)]
    return ticks if len(ticks) > 1 else [low, high]
