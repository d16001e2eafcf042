from collections import Counter

import numpy as np
import pytest
from scipy import stats

from wanlora.core.intervals import describe_sample, mean_interval, t95
from wanlora.training import flow
from wanlora.training.flow import sigma_grid
from wanlora.training.panel import choose, summarize


def test_student_quantiles_are_scipys():
    for degrees in (1, 2, 5, 15, 30, 31, 60, 500):
        assert t95(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-4)


def test_the_grid_has_the_mean_of_the_density():
    grid = sigma_grid(64, sampler="logit_normal", shift=3.0)
    draws = [
        flow.sigma_of((i + 0.5) / 9999, sampler="logit_normal", shift=3.0) for i in range(9999)
    ]
    assert np.mean(grid) == pytest.approx(np.mean(draws), abs=2e-3)
    assert grid == sorted(grid)


def test_the_interval_is_that_of_a_paired_t_test_over_source_groups():
    random = np.random.default_rng(0)
    base = random.random((6, 4)) + 1
    losses = base - 0.05 + 0.02 * random.standard_normal((6, 1))
    names = ["a", "a", "b", "c", "c", "c"]
    of_group = [[0, 1], [2], [3, 4, 5]]
    report = summarize(
        losses, base, sigmas=[0.1, 0.4, 0.7, 0.9], activities=list("xxxyyy"), groups=names
    )
    own, other = ([table[rows].mean() for rows in of_group] for table in (losses, base))
    expected = stats.ttest_rel(own, other).confidence_interval(0.95)
    assert report.ci95 == pytest.approx((expected.low, expected.high), rel=1e-4)
    assert (report.num_clips, report.num_groups) == (6, 3)
    assert report.mean == pytest.approx(np.mean(own))
    assert report.difference == pytest.approx(report.mean - report.base_mean)
    assert report.per_activity["x"][0] == pytest.approx((own[0] + own[1]) / 2)
    by_group = [np.mean([table[rows, 1].mean() for rows in of_group]) for table in (losses, base)]
    assert report.per_sigma[1] == pytest.approx((0.4, *by_group))


def test_groups_of_one_clip_each_give_the_interval_over_clips():
    values = np.random.default_rng(3).standard_normal(7)
    found = mean_interval(values, [str(i) for i in range(7)])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.ci95 == pytest.approx((expected.low, expected.high), rel=1e-4)
    assert found.mean == pytest.approx(values.mean())


def test_a_model_against_itself_shows_no_difference():
    base = np.random.default_rng(1).random((5, 3))
    sigmas = [0.2, 0.5, 0.8]
    report = summarize(base, base, sigmas=sigmas, activities=["x"] * 5, groups=list("aabbc"))
    assert (report.difference, report.ci95) == (0.0, (0.0, 0.0))


def test_clips_of_a_single_source_have_no_interval_and_few_sources_a_wide_one():
    base = np.random.default_rng(1).random((4, 2))
    alone = summarize(base, base + 1, sigmas=[0.2, 0.8], activities=["x"] * 4, groups=["one"] * 4)
    assert (alone.ci95, alone.standard_error, alone.num_groups) == (None, None, 1)
    assert "no interval" in describe_sample(4, 1)
    assert "wide" in describe_sample(16, 4)
    assert "wide" not in describe_sample(16, 16)
    assert describe_sample(16, None) == "16 clips"  # as release 0.1.0 recorded it


@pytest.mark.parametrize("groups", [8, 4])
def test_the_interval_over_groups_covers_the_truth_and_the_one_over_clips_does_not(groups):
    """A small version of bench/coverage.py: correlation 0.6 between clips of one source."""
    random, per_group, runs = np.random.default_rng(2), 16 // groups, 1500
    names = [str(i // per_group) for i in range(16)]
    covered = {"groups": 0, "clips": 0}
    for _ in range(runs):
        shared = np.repeat(random.standard_normal(groups), per_group)
        values = 0.6**0.5 * shared + 0.4**0.5 * random.standard_normal(16)
        for kind, grouped in (("groups", names), ("clips", [str(i) for i in range(16)])):
            low, high = mean_interval(values, grouped).ci95
            covered[kind] += low < 0 < high
    assert 0.93 < covered["groups"] / runs < 0.97
    assert covered["clips"] / runs < 0.9


def test_clips_are_chosen_evenly_over_activities_and_by_the_seed_alone():
    activities = ["walk"] * 50 + ["sit"] * 5 + ["clap"] * 2
    groups = [str(i) for i in range(57)]
    chosen = choose(activities, groups, 9, seed=3)
    counts = {name: sum(activities[i] == name for i in chosen) for name in set(activities)}
    assert counts == {"walk": 3, "sit": 4, "clap": 2}
    assert chosen == choose(activities, groups, 9, seed=3) != choose(activities, groups, 9, seed=4)
    assert choose(activities, groups, 999, seed=0) == list(range(57))


def test_clips_are_chosen_from_different_source_groups_first():
    """Eight people, each in two activities and four clips of each: everybody once, then twice."""
    people = [str(i // 8) for i in range(64)]
    activities = ["walk" if i % 8 < 4 else "sit" for i in range(64)]
    for seed in range(5):
        for num_clips in (3, 8, 11, 16):
            chosen = choose(activities, people, num_clips, seed=seed)
            counts = Counter(people[i] for i in chosen)
            assert len(counts) == min(num_clips, 8)
            assert max(counts.values()) - min(counts.values()) <= 1
            walks = sum(activities[i] == "walk" for i in chosen)
            assert abs(2 * walks - num_clips) <= 1


def test_a_group_with_many_clips_does_not_slow_the_choice():
    assert len(choose(["a"] * 100_000, ["one"] * 100_000, 500, seed=0)) == 500
