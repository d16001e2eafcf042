"""The loss over the ranges of both experts, against plain loops, scipy and simulated panels."""

import math
from statistics import fmean

import numpy as np
import pytest
from scipy import stats

from wanlora.commands.evaluate.joined import RangeLosses, answer, compare_gains, join
from wanlora.training.flow import sigma_grid

BOUNDARY, SHIFT = 0.875, 3.0
GROUPS = list("aaabbcdeef")  # sources with three clips, two, and one


def ranges(random, num_clips=10, share=0.3):
    """Losses of both experts with their own noise levels: 5 for one and 3 for the other."""
    parts = {"high": (share, 5), "low": (1 - share, 3)}
    return {
        expert: RangeLosses(part, *random.uniform(0.1, 1, (2, num_clips, columns)))
        for expert, (part, columns) in parts.items()
    }


def by_hand(parts, groups):
    """Mean of each source, by loops over Python numbers: (base, adapter, differences)."""
    sources: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        sources.setdefault(group, []).append(row)

    def total(kind, row):
        return sum(part.share * fmean(getattr(part, kind)[row].tolist()) for part in parts.values())

    base = [fmean(total("base", row) for row in rows) for rows in sources.values()]
    adapter = [fmean(total("adapter", row) for row in rows) for rows in sources.values()]
    return fmean(base), fmean(adapter), [a - b for a, b in zip(adapter, base, strict=True)]


def test_the_joined_change_is_that_of_plain_loops_and_its_interval_is_scipys():
    parts = ranges(np.random.default_rng(0))
    base, adapter, changes = by_hand(parts, GROUPS)
    found = join(parts, GROUPS)
    assert (found["base"], found["adapter"]) == (pytest.approx(base), pytest.approx(adapter))
    assert found["paired_difference"] == pytest.approx(adapter - base)
    expected = stats.ttest_1samp(changes, 0).confidence_interval(0.95)
    assert found["ci95"] == pytest.approx(list(expected), abs=1e-6)
    assert found["standard_error"] == pytest.approx(stats.sem(changes))
    assert (found["clips"], found["source_groups"]) == (10, 6)


def test_one_source_has_a_joined_change_and_no_interval():
    found = join(ranges(np.random.default_rng(1), num_clips=4), ["one"] * 4)
    assert found["ci95"] is None
    assert found["paired_difference"] == pytest.approx(found["adapter"] - found["base"])


@pytest.mark.parametrize("shift", [3.0, 12.0])
def test_joined_losses_are_those_over_the_whole_density(shift):
    """A loss that is a function of sigma alone: its mean over all of the density is known."""

    def loss(sigma, scale):
        return np.array([[math.cos(2 * s) + scale * s**2 for s in sigma]])

    whole = sigma_grid(2_000, sampler="uniform", shift=shift)
    share = BOUNDARY / (shift - (shift - 1) * BOUNDARY)  # u of the boundary: the inverse shift
    parts = {}
    for expert, inside in (
        ("high", [s for s in whole if s >= BOUNDARY]),
        ("low", [s for s in whole if s < BOUNDARY]),
    ):
        part = 1 - share if expert == "high" else share
        parts[expert] = RangeLosses(part, loss(inside, 1.0), loss(inside, 0.5))
    found = join(parts, ["one"])
    assert found["base"] == pytest.approx(loss(whole, 1.0).mean(), rel=2e-3)
    assert found["adapter"] == pytest.approx(loss(whole, 0.5).mean(), rel=2e-3)


def test_the_joined_interval_covers_its_share_where_both_experts_share_the_sources():
    """The changes of both experts depend on the same sources, which separate errors would miss."""
    random, runs, num_groups, clips = np.random.default_rng(2), 600, 8, 2
    groups = [str(index // clips) for index in range(num_groups * clips)]
    share, truth = 0.4, 0.4 * -0.3 + 0.6 * -0.1
    covered = {"joined": 0, "as if independent": 0}
    for _ in range(runs):
        of_source = np.repeat(random.standard_normal(num_groups), clips)
        parts = {}
        for expert, (part, mean) in {"high": (share, -0.3), "low": (1 - share, -0.1)}.items():
            own = random.standard_normal(len(groups))
            change = mean + 0.5 * of_source + 0.2 * own
            parts[expert] = RangeLosses(part, np.zeros((len(groups), 1)), change[:, None])
        low, high = join(parts, groups)["ci95"]
        covered["joined"] += low < truth < high
        errors = [part.share * part.change.std(ddof=1) / math.sqrt(len(groups))
                  for part in parts.values()]  # fmt: skip
        middle = sum(part.share * part.change.mean() for part in parts.values())
        reach = 1.96 * math.hypot(*errors)
        covered["as if independent"] += middle - reach < truth < middle + reach
    assert 0.93 < covered["joined"] / runs < 0.97
    assert covered["as if independent"] / runs < 0.75


def with_changes(high, low):
    groups = [str(index) for index in range(len(high))]
    zeros = np.zeros((len(high), 1))
    parts = {
        "high": RangeLosses(0.3, zeros, np.array(high)[:, None]),
        "low": RangeLosses(0.7, zeros, np.array(low)[:, None]),
    }
    return parts, groups


def test_the_larger_gain_is_named_only_if_its_interval_shows_it():
    clear = compare_gains(*with_changes([-0.3, -0.31, -0.29] * 3, [-0.1, -0.11, -0.09] * 3))
    assert clear["larger_gain"] == "high"
    assert clear["paired_difference"] == pytest.approx(-0.2)
    wide = compare_gains(*with_changes([-0.3, 0.5, -0.9] * 3, [-0.1, -0.11, -0.09] * 3))
    assert wide["larger_gain"] is None
    few = compare_gains(*with_changes([-0.3, -0.31, -0.29], [-0.1, -0.11, -0.09]))
    assert few["larger_gain"] is None  # three sources decide nothing


def test_the_answer_names_each_expert_its_verdict_and_both_gains():
    def figures(difference, ci95, groups=9):
        return {"paired_difference": difference, "ci95": ci95, "source_groups": groups}

    gains = {"paired_difference": -0.2, "ci95": [-0.25, -0.15], "larger_gain": "high"}
    learned, nothing = figures(-0.3, [-0.35, -0.25]), figures(-0.1, [-0.3, 0.1])
    line = answer({"high": learned, "low": nothing}, gains)
    assert "expert: yes" in line
    assert "expert: not shown" in line
    assert "high +0.3000, low +0.1000" in line
    assert "+0.1500 to +0.2500" in line
    worse = answer({"low": figures(0.1, [0.05, 0.15])}, None)
    assert "low-noise expert: no" in worse
    assert "high" not in worse.partition("?")[2].replace("higher", "")
    assert "too few" in answer({"low": figures(-0.1, None, groups=1)}, None)
