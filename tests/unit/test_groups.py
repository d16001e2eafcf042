"""How many source groups are enough, and what an interval shows."""

import pytest

from wanlora.core.intervals import conclusion, describe_few_groups


@pytest.mark.parametrize(
    ("held_out", "groups", "advice"),
    [
        (0, 1, "--val-fraction 0.5"), (1, 9, "at least 12 source groups"),
        (1, 16, "--val-fraction 0.4"), (0, 120, "--val-fraction 0.05"),
    ],
)  # fmt: skip
def test_too_few_held_out_groups_are_described_with_the_share_that_makes_enough(
    held_out, groups, advice
):
    text = describe_few_groups(held_out, groups)
    assert f"{held_out} of {groups} source groups" in text
    assert advice in text
    assert describe_few_groups(6, 12) is None


@pytest.mark.parametrize(
    ("ci95", "num_groups", "expected"),
    [
        ((-0.3, -0.1), 6, "lower"), ((0.1, 0.3), 6, "higher"), ((-0.3, 0.1), 6, "no difference"),
        ((-0.3, -0.1), 5, "too few"), (None, 1, "too few"), ((-0.3, -0.1), None, "lower"),
    ],
)  # fmt: skip
def test_a_difference_is_called_lower_only_if_interval_and_groups_show_it(
    ci95, num_groups, expected
):
    assert conclusion(ci95, num_groups).startswith(expected)
