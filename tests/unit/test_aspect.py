"""Sizes that keep a picture's aspect."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanlora.core.aspect import nearest_size, sizes

AREA = 480 * 832


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1920, 1080, (480, 832)), (1280, 720, (480, 832)), (1080, 1920, (832, 480)),
        (1000, 1000, (624, 624)), (640, 480, (544, 720)), (2560, 1080, (416, 960)),
        (10000, 100, (368, 1072)), (100, 10000, (1072, 368)),
    ],
)  # fmt: skip
def test_known_pictures(width, height, expected):
    assert nearest_size(Fraction(width), height, area=AREA) == expected


@given(st.integers(16, 8000), st.integers(16, 8000))
def test_a_bucket_fits_wan_and_loses_little(width, height):
    found = nearest_size(Fraction(width), height, area=AREA)
    assert found in sizes(AREA)
    assert found[0] % 16 == found[1] % 16 == 0
    assert found[0] * found[1] <= AREA
    if max(width, height) <= 2.8 * min(width, height):
        ratio = (found[1] / found[0]) / (width / height)
        assert min(ratio, 1 / ratio) > 0.95
        assert found[0] * found[1] > 0.93 * AREA
