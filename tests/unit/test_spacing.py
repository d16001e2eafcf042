"""Evenly spaced indices."""

import pytest

from wanlora.core.spacing import evenly_spaced


@pytest.mark.parametrize(
    ("number", "most", "expected"),
    [
        (0, 3, []),
        (2, 3, [0, 1]),
        (5, 1, [0]),
        (5, 3, [0, 2, 4]),
        (11, 3, [0, 5, 10]),
        (10, 4, [0, 3, 6, 9]),
    ],
)
def test_indices_are_evenly_spaced_from_the_first_to_the_last(number, most, expected):
    assert evenly_spaced(number, most) == expected
