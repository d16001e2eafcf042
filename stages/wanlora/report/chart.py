"""Line charts as inline SVG: no library, no network, readable in light and dark.

Owns: scales, ticks and marks. Must not know: what the numbers mean.
Legend: a point is (x, y) in the units of the data; px are pixels of the view box.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Float

from wanlora.report.asset import style
from wanlora.report.page import Raw, escape

WIDTH, HEIGHT = 620, 280
LEFT, RIGHT, TOP, BOTTOM = 80, 24, 10, 44
MOST_POINTS = 400
"""Maximum number of points of a line; more cannot be seen at this width."""
MOST_STRIPS = 120
"""Maximum number of places that show their values under the pointer."""

COLOURS = (
    "light-dark(#2563eb, #7aa2ff)",
    "light-dark(#c2570c, #ffab66)",
    "light-dark(#15803d, #6ddc98)",
    "light-dark(#7e22ce, #d3a4ff)",
    "light-dark(#0e7490, #67d3e8)",
    "light-dark(#be185d, #ff9ac6)",
    "light-dark(#7a6a00, #e0cf5a)",
    "light-dark(#57534e, #bdb6ae)",
)

Point = tuple[float, float]
Scale = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Line:
    """One curve.

    Attributes:
        name: Name in the legend and under the pointer.
        points: Finite points, sorted by x.
        colour: Index in `COLOURS`.
        style: faint: raw values behind a smoothed curve; dashed: a reference.
        band: (x, low, high) of each interval around it.
    """

    name: str
    points: Sequence[Point]
    colour: int = 0
    style: Literal["solid", "faint", "dashed"] = "solid"
    band: Sequence[tuple[float, float, float]] = ()


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str = "step",
    log_y: bool = False,
    zero: bool = False,
    empty: str = "nothing yet",
) -> Raw:
    """Draw a chart. Lines without points are left out; without any line it is the text `empty`.

    Args:
        title: Title, with the unit of y.
        lines: The curves.
        x_label: Label of the x axis.
        log_y: Logarithmic y; values of 0 and less are not drawn but counted in the title.
        zero: Include y = 0 and mark it by a line.
        empty: Text in place of a chart without points.
    """
    hidden = 0
    if log_y:
        shown = [_positive(line) for line in lines]
        hidden = sum(len(a.points) - len(b.points) for a, b in zip(lines, shown, strict=True))
        lines = shown
    lines = [line for line in lines if line.points]
    if not lines:
        return Raw(
            f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
            f'<p class="soft">{escape(empty)}</p></figure>'
        )
    if hidden:
        title += f" ({hidden} values of 0 or less not shown)"
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    ys += [end for line in lines for _, *ends in line.band for end in ends if end > 0 or not log_y]
    x_of, x_ticks = _linear(min(xs), max(xs), LEFT, WIDTH - RIGHT, most=7)
    make = _logarithmic if log_y else _linear
    low, high = (min([*ys, 0.0]), max([*ys, 0.0])) if zero else (min(ys), max(ys))
    y_of, y_ticks = make(low, high, HEIGHT - BOTTOM, TOP, most=5)
    parts = [
        *_axes(x_of, x_ticks, y_of, y_ticks, x_label),
        *([_rule(y_of(0.0))] if zero else []),
        *_strips(lines, x_of, x_label),
        *(_band(line, x_of, y_of) for line in lines if line.band),
        *(_curve(line, x_of, y_of) for line in lines),
    ]
    label = escape(f"{title}: {', '.join(line.name for line in lines)}")
    return Raw(
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{_legend(lines)}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg></figure>"
    )


def charts(*drawn: Raw) -> Raw:
    """Put charts side by side if there is room."""
    return Raw(f'{style("chart.css")}<div class="charts">{"".join(drawn)}</div>')


def extremes(values: Float[np.ndarray, " n"], most: int = MOST_POINTS) -> list[int]:
    """Indices of the lowest and highest values of `most` / 2 equal parts, so that spikes stay."""
    if len(values) <= most:
        return list(range(len(values)))
    edges = np.linspace(0, len(values), most // 2 + 1).astype(int)
    shares = list(pairwise(edges))
    return sorted({int(a + f(values[a:b])) for a, b in shares for f in (np.argmin, np.argmax)})


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) inside a range."""
    span = high - low
    magnitude = 10.0 ** math.floor(math.log10(span / most))
    step = next(m * magnitude for m in (1, 2, 5, 10) if span / (m * magnitude) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _positive(line: Line) -> Line:
    return Line(
        line.name, [p for p in line.points if p[1] > 0], line.colour, line.style,
        [b for b in line.band if b[1] > 0],
    )  # fmt: skip


def _linear(
    low: float, high: float, start: float, end: float, *, most: int
) -> tuple[Scale, list[float]]:
    if high - low <= 1e-12 * max(abs(low), abs(high)):  # one value: add a margin
        room = abs(low) / 2 or 0.5
        low, high = low - room, high + room
    elif end < start:  # y: a margin above and below
        air = 0.04 * (high - low)
        low, high = low - (air if low else 0.0), high + (air if high else 0.0)
    return (lambda v: start + (v - low) / (high - low) * (end - start)), ticks(low, high, most)


def _logarithmic(
    low: float, high: float, start: float, end: float, *, most: int
) -> tuple[Scale, list[float]]:
    low, high = math.log10(low), math.log10(high)
    if high - low < 0.1:
        low, high = low - 0.3, high + 0.3
    decades = range(math.floor(low), math.ceil(high) + 1)
    factors = (1,) if high - low > most else (1, 2, 5)
    marks = [m * 10.0**d for d in decades for m in factors]
    every = max(1, math.ceil(len(decades) / most)) if factors == (1,) else 1
    inside = [mark for mark in marks[::every] if low - 1e-9 <= math.log10(mark) <= high + 1e-9]
    return (lambda v: start + (math.log10(v) - low) / (high - low) * (end - start)), inside


def _axes(
    x_of: Scale, x_ticks: Sequence[float], y_of: Scale, y_ticks: Sequence[float], x_label: str
) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>']
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    for tick in x_ticks:
        x = x_of(tick)
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v5"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{_number(tick)}</text>'
        )
    middle = (LEFT + right) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return parts


def _rule(y: float) -> str:
    return f'<path class="axis" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'


def _curve(line: Line, x_of: Scale, y_of: Scale) -> str:
    kept = extremes(np.array([y for _, y in line.points]))
    points = [line.points[index] for index in kept]
    places = [f"{x_of(x):.1f} {y_of(y):.1f}" for x, y in points]
    style = f"stroke: {COLOURS[line.colour]}"
    curve = f'<path class="line {line.style}" style="{style}" d="M{"L".join(places)}"/>'
    if len(points) > 40 or line.style != "solid":
        return curve
    fill = f"fill: {COLOURS[line.colour]}"
    dots = "".join(
        f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3" style="{fill}"/>' for x, y in points
    )
    return curve + dots


def _band(line: Line, x_of: Scale, y_of: Scale) -> str:
    lower = [f"{x_of(x):.1f} {y_of(low):.1f}" for x, low, _ in line.band]
    upper = [f"{x_of(x):.1f} {y_of(high):.1f}" for x, _, high in line.band]
    fill = COLOURS[line.colour]
    if len(line.band) == 1:  # an interval at one place: a bar
        return f'<path class="line" style="stroke: {fill}" d="M{lower[0]}L{upper[0]}"/>'
    outline = "L".join(lower + upper[::-1])
    return f'<path class="band" style="fill: {fill}" d="M{outline}Z"/>'


def _strips(lines: Sequence[Line], x_of: Scale, x_label: str) -> list[str]:
    """Invisible strips over the plot, each with the values at its place as a title."""
    xs = sorted({x for line in lines for x, _ in line.points})
    chosen = xs[:: math.ceil(len(xs) / MOST_STRIPS)]
    columns = [([x for x, _ in line.points], line) for line in lines]
    places = [x_of(x) for x in chosen]
    edges = [
        float(LEFT),
        *((a + b) / 2 for a, b in pairwise(places)),
        float(WIDTH - RIGHT),
    ]
    parts = []
    for x, (start, end) in zip(chosen, pairwise(edges), strict=True):
        values = [
            f"{line.name}: {_number(line.points[i][1])}"
            for known, line in columns
            if (i := bisect_left(known, x)) < len(known) and known[i] == x
        ]
        text = escape("\n".join([f"{x_label} {_number(x)}", *values]))
        parts.append(
            f'<rect class="strip-x" x="{start:.1f}" y="{TOP}" width="{end - start:.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"><title>{text}</title></rect>'
        )
    return parts


def _legend(lines: Sequence[Line]) -> str:
    """Names under the title, on as many lines as they need."""
    items = [
        f'<span><i class="swatch {line.style}" style="border-color: {COLOURS[line.colour]}"></i>'
        f"{escape(line.name)}</span>"
        for line in lines
    ]
    return f'<div class="legend">{"".join(items)}</div>'


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}"
