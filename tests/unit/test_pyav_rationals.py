"""Rational numbers of PyAV 17 to 19, and the unset ones."""

from fractions import Fraction

import pytest

from wanlora.media.frames import fraction

AVRational = pytest.importorskip("av.rational", reason="PyAV 17 gives Fraction").AVRational


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (AVRational(1, 1000), Fraction(1, 1000)),
        (Fraction(30000, 1001), Fraction(30000, 1001)),
        (AVRational(0, 1), None),
        (AVRational(1, 0), None),
        (AVRational(0, 0), None),
        (None, None),
    ],
)
def test_rationals_of_every_pyav_become_fractions_and_unset_ones_none(given, expected):
    found = fraction(given)
    assert found == expected
    assert type(found) is type(expected)
