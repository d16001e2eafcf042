"""Charts show what they were given: places, ticks, words."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from wanlora.report.chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Line,
    extremes,
    line_chart,
    ticks,
)


def drawn(*lines, **settings) -> ET.Element:
    """The chart as a tree: it is well-formed."""
    return ET.fromstring(line_chart("loss", lines, **settings)).find("svg")


def curve(svg) -> list[tuple[float, float]]:
    path = next(p for p in svg.iter("path") if p.get("class", "").startswith("line"))
    return [tuple(map(float, pair.split())) for pair in path.get("d")[1:].split("L")]


def test_points_stand_where_their_values_say():
    points = curve(drawn(Line("a", [(0, 1.0), (50, 2.0), (100, 3.0)])))
    (x0, y0), (x1, y1), (x2, y2) = points
    assert (x0, x2) == (LEFT, WIDTH - RIGHT)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert HEIGHT - BOTTOM > y0 > y1 > y2 > TOP


def test_a_logarithmic_axis_gives_each_factor_the_same_height():
    (_, a), (_, b), (_, c) = curve(drawn(Line("a", [(0, 0.01), (1, 0.1), (2, 1.0)]), log_y=True))
    assert b - a == pytest.approx(c - b, abs=0.1)


def test_values_that_a_logarithm_has_not_got_are_counted_not_dropped_in_silence():
    chart = line_chart("lr", [Line("a", [(0, 0.0), (1, 0.1), (2, 1.0)])], log_y=True)
    assert "1 values of 0" in chart


def test_the_pointer_reads_every_line_at_its_place():
    svg = drawn(Line("raw", [(0, 1.5), (1, 2.0)]), Line("smooth <b>", [(1, 1.75)]))
    said = [title.text for title in svg.iter("title")]
    assert said == ["step 0\nraw: 1.5", "step 1\nraw: 2\nsmooth <b>: 1.75"]


def test_an_interval_is_a_band_around_its_line():
    points = [(0, 1.0), (10, 2.0)]
    svg = drawn(Line("a", points, band=[(0, 0.5, 1.5), (10, 1.5, 2.5)]), zero=True)
    band = next(p for p in svg.iter("path") if p.get("class") == "band")
    corners = [tuple(map(float, c.split())) for c in band.get("d")[1:-1].split("L")]
    for (_, y), (_, low), (_, high) in zip(curve(svg), corners[:2], corners[:1:-1], strict=True):
        assert high < y < low  # px count downwards


@pytest.mark.parametrize(
    "points", [[(0, 1.0)], [(0, 0.0), (1, 0.0)], [(5, 1e-9), (6, 1e-9)], [(0, 1e6), (1, -1e6)]]
)
@pytest.mark.parametrize("zero", [False, True])
def test_awkward_ranges_are_drawn_inside_the_frame(points, zero):
    for x, y in curve(drawn(Line("a", points), zero=zero)):
        assert LEFT <= x <= WIDTH
        assert TOP - 1 <= y <= HEIGHT - BOTTOM + 1


def test_a_chart_of_nothing_says_so():
    assert "nothing yet" in line_chart("loss", [Line("a", [])])


def test_ticks_are_round_numbers_inside_the_range():
    assert ticks(0, 3000, 7) == [0, 500, 1000, 1500, 2000, 2500, 3000]
    assert ticks(0.31, 0.97, 5) == pytest.approx([0.4, 0.6, 0.8])
    assert all(-2.5 <= tick <= 7.1 for tick in ticks(-2.5, 7.1, 5))


def test_thinning_keeps_spikes_and_order():
    values = np.sin(np.arange(10_000) / 500)
    values[7_777] = 50.0
    kept = extremes(values)
    assert len(kept) <= 400
    assert 7_777 in kept
    assert kept == sorted(kept)
    assert extremes(values[:400]) == list(range(400))


def test_a_long_run_is_a_small_chart():
    points = [(float(i), float(i % 17)) for i in range(50_000)]
    assert len(line_chart("loss", [Line("a", points)])) < 40_000
    assert len(re.findall("<rect", line_chart("loss", [Line("a", points)]))) <= 120
