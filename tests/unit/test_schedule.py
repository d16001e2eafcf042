from fractions import Fraction
from itertools import pairwise

import pytest

from wanlora.training.schedule import default_warmup, describe_short_run, multiplier


def test_warmup_rises_to_one_and_the_first_step_already_learns():
    values = [multiplier(s, schedule="constant", warmup_steps=4, num_steps=10) for s in range(10)]
    assert values[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert values[4:] == [1.0] * 6


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_decay_starts_at_one_ends_at_zero_and_never_rises(name):
    values = [multiplier(s, schedule=name, warmup_steps=2, num_steps=12) for s in range(2, 13)]
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(0.0, abs=1e-12)
    assert all(a >= b for a, b in pairwise(values))


@pytest.mark.parametrize(("steps", "expected"), [(2, 0), (12, 1), (400, 40), (5000, 100)])
def test_warmup_is_a_tenth_of_the_run_and_at_most_100_steps(steps, expected):
    assert default_warmup(steps) == expected


def test_a_run_too_short_to_learn_from_is_described_with_numbers_and_a_way_out():
    """9 clips, 10 epochs, 8 micro-batches of one clip per step."""
    facts = {
        "steps_per_epoch": Fraction(9, 8), "draws_per_epoch": Fraction(9), "num_epochs": 10,
        "accumulation": 8, "num_processes": 1,
    }  # fmt: skip
    text = describe_short_run(12, **facts)
    for fact in ("12 optimizer", "9 clips", "8 per step", "--max-steps 100", "--num-epochs 89",
                 "--gradient-accumulation-steps 1", "90 steps"):  # fmt: skip
        assert fact in text
    assert "1 optimizer step " in describe_short_run(1, **facts)
    two = describe_short_run(12, **facts | {"num_processes": 2})
    assert "--gradient-accumulation-steps 2" in two
    assert "45 steps" in two
    assert "accumulation" not in describe_short_run(12, **facts | {"num_epochs": None})
    assert "accumulation" not in describe_short_run(12, **facts | {"accumulation": 1})
    assert describe_short_run(100, **facts) is None
