from itertools import pairwise

import pytest

from wanlora.core.schedule import multiplier


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
