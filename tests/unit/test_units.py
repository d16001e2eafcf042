"""Durations, sizes, counts and shares as people read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanlora.core import units


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (1e-7, "under 1 ms"), (0.035, "35 ms"), (0.289, "0.289 s"), (1.524, "1.52 s"),
        (42.6, "43 s"), (119, "119 s"), (120, "2.0 min"), (181, "3.0 min"), (599, "10 min"),
        (750, "12 min"),
        (7200, "2.0 h"), (12_600, "3.5 h"), (100_000, "28 h"), (181_440, "2.1 days"),
        (86_400 * 1500, "1,500 days"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert units.duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (840, "840 B"), (999.9, "1 kB"), (83_210, "83.2 kB"), (4.81e6, "4.81 MB"),
     (832_000, "832 kB"), (999_999, "1 MB"), (25.4e9, "25.4 GB"), (2e12, "2 TB"),
     (3e18, "3e+03 PB")],
)  # fmt: skip
def test_sizes(num_bytes, text):
    assert units.size(num_bytes) == text


def test_counts_numbers_and_shares():
    assert [units.count(n, "line") for n in (0, 1, 2, 1234)] == [
        "0 lines", "1 line", "2 lines", "1,234 lines",
    ]  # fmt: skip
    assert units.count(2, "process", "processes") == "2 processes"
    assert [units.number(n) for n in (0, 512, 492_000, 23.6e6, 1.32e9)] == [
        "0", "512", "492 k", "23.6 M", "1.32 B",
    ]  # fmt: skip
    assert units.flops(870.2e12) == "870 TFLOP"
    assert units.flops(0.002e9, "FLOP/s") == "2 MFLOP/s"
    assert [units.percent(x) for x in (0, 0.004, -0.0123, 0.0996, 0.156, 1)] == [
        "0 %", "0.4 %", "-1.2 %", "10 %", "16 %", "100 %",
    ]  # fmt: skip


@given(st.floats(0, 1e17))
def test_no_exponent_is_printed(value):
    assert "e" not in units.size(value).replace("e+", "?")
    assert len(units.size(value)) <= len("999.9 GB")
    for text in (units.duration(value * 1e-9), units.number(value * 1e-4)):
        assert "e+" not in text
        assert "e-" not in text


def test_lists_name_the_first_and_count_the_others():
    assert units.first(["a", "b"], "FILE") == ["  a", "  b"]
    many = units.first([str(n) for n in range(1007)], "FILE")
    assert many == ["  0", "  1", "  2", "  3", "  4", "  and 1,002 more in FILE"]
    assert units.names("abcde") == "a, b, c and 2 more"
    assert units.names([]) == ""


def test_a_tally_has_each_name_and_its_number():
    assert units.tally({"missing": 2, "too_short": 1}) == "missing 2, too_short 1"
    assert units.tally({}) == ""
