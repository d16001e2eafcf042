import re

from wanlora.core.intervals import describe_change
from wanlora.report.intervals import Interval, interval_chart


def circles(chart):
    return re.findall(r'<circle cx="([\d.]+)"[^>]*fill: ([^;]+);', chart)


def test_an_interval_that_covers_zero_is_hollow_and_one_without_ends_too():
    chart = interval_chart(
        "Change", [Interval("a", -5, (-8, -2)), Interval("b", -1, (-3, 1)), Interval("c", 2, None)],
        x_label="%", unit=" %",
    )  # fmt: skip
    fills = [fill for _, fill in circles(chart)]
    assert fills[0] != "var(--ground)"
    assert fills[1:] == ["var(--ground)"] * 2
    places = [float(x) for x, _ in circles(chart)]
    assert places[0] < places[1] < places[2]
    assert "-5.00 % (-8.00 to -2.00)" in chart
    assert "+2.00 %<" in chart


def test_names_are_escaped_and_long_ones_cut_in_sight_but_not_in_the_title():
    name = "<b>" + "x" * 60
    chart = interval_chart("T", [Interval(name, 0, (0, 0))], x_label="", unit="")
    assert "<b>" not in chart
    assert "x" * 60 in chart  # under the pointer
    assert "x…" in chart


def test_a_change_is_in_percent_of_the_base_with_its_interval():
    assert describe_change(-0.1, 2.0, (-0.2, 0.0)) == "-5.00 %, 95 % interval -10.00 to +0.00 %"
    assert describe_change(-0.1, 2.0, None, decimals=1) == "-5.0 %"
