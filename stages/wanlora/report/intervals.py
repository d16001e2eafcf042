"""A chart of values with intervals, one per line, as inline SVG, with a line at zero.

Owns: its layout. Must not know: what the numbers mean.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wanlora.report.chart import COLOURS, ticks
from wanlora.report.page import Raw, escape

WIDTH, ROW, TOP, BOTTOM = 760, 26, 8, 40
NAME_WIDTH, VALUE_WIDTH = 170, 220
MOST_LETTERS = 26


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with the ends of its interval; without `ends` only a dot is drawn."""

    name: str
    value: float
    ends: tuple[float, float] | None
    colour: int = 0
    bold: bool = False


def interval_chart(title: str, intervals: Sequence[Interval], *, x_label: str, unit: str) -> Raw:
    """Draw values with their intervals; the dot of an interval that contains zero is hollow.

    Args:
        title: Title of the chart.
        intervals: From top to bottom; at least one.
        x_label: Label of the x axis.
        unit: Unit that follows each number.
    """
    reach = [0.0] + [end for item in intervals for end in (item.value, *(item.ends or ()))]
    low, high = min(reach), max(reach)
    margin = 0.06 * (high - low) or 1.0
    low, high = low - margin, high + margin
    left, right = NAME_WIDTH, WIDTH - VALUE_WIDTH
    bottom = TOP + ROW * len(intervals)

    def x_of(value: float) -> float:
        return float(left + (value - low) / (high - low) * (right - left))

    parts = []
    for tick in ticks(low, high, 5):
        x = x_of(tick)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{tick:+.4g}</text>')
    parts.append(f'<path class="axis" d="M{x_of(0):.1f} {TOP}V{bottom}"/>')
    parts += [_row(item, TOP + ROW * (n + 0.5), x_of, unit) for n, item in enumerate(intervals)]
    parts.append(
        f'<text x="{(left + right) / 2}" y="{bottom + 34}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    return Raw(
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {bottom + BOTTOM}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _row(item: Interval, y: float, x_of: Callable[[float], float], unit: str) -> str:
    colour = COLOURS[item.colour % len(COLOURS)]
    x = x_of(item.value)
    text = f"{item.value:+.2f}{unit}"
    bar, hollow = "", True
    if item.ends:
        low, high = item.ends
        hollow = low <= 0 <= high
        text += f" ({low:+.2f} to {high:+.2f})"
        stroke = f"stroke: {colour}"
        bar = f'<path class="line" style="{stroke}" d="M{x_of(low):.1f} {y}H{x_of(high):.1f}"/>'
    fill = "var(--ground)" if hollow else colour
    name = item.name if len(item.name) <= MOST_LETTERS else f"{item.name[: MOST_LETTERS - 1]}…"
    weight = ' style="font-weight: 600; fill: var(--ink)"' if item.bold else ""
    return (
        f"<g><title>{escape(f'{item.name}: {text}')}</title>"
        f'<text x="{NAME_WIDTH - 10}" y="{y + 4}" text-anchor="end"{weight}>{escape(name)}</text>'
        f'{bar}<circle cx="{x:.1f}" cy="{y}" r="4.5" '
        f'style="fill: {fill}; stroke: {colour}; stroke-width: 2"/>'
        f'<text x="{WIDTH - VALUE_WIDTH + 10}" y="{y + 4}"{weight}>{escape(text)}</text></g>'
    )
