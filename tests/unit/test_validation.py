import numpy as np
import pytest
from scipy import stats

from wanlora.core import flow
from wanlora.core.validation import choose, sigma_grid, summarize, t95


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


def test_the_interval_is_that_of_a_paired_t_test_over_clips():
    random = np.random.default_rng(0)
    base = random.random((6, 4)) + 1
    losses = base - 0.05 + 0.02 * random.standard_normal((6, 1))
    report = summarize(losses, base, sigmas=[0.1, 0.4, 0.7, 0.9], activities=list("aabbcc"))
    expected = stats.ttest_rel(losses.mean(axis=1), base.mean(axis=1)).confidence_interval(0.95)
    assert report.ci95 == pytest.approx((expected.low, expected.high), rel=1e-4)
    assert report.difference == pytest.approx(report.mean - report.base_mean)
    assert report.per_activity["a"][0] == pytest.approx(losses[:2].mean())
    assert report.per_sigma[1] == pytest.approx((0.4, losses[:, 1].mean(), base[:, 1].mean()))


def test_a_model_against_itself_shows_no_difference():
    base = np.random.default_rng(1).random((5, 3))
    report = summarize(base, base, sigmas=[0.2, 0.5, 0.8], activities=["x"] * 5)
    assert (report.difference, report.ci95) == (0.0, (0.0, 0.0))
    alone = summarize(base[:1], base[:1], sigmas=[0.2, 0.5, 0.8], activities=["x"])
    assert alone.ci95 is None


def test_clips_are_chosen_evenly_over_activities_and_by_the_seed_alone():
    activities = ["walk"] * 50 + ["sit"] * 5 + ["clap"] * 2
    chosen = choose(activities, 9, seed=3)
    counts = {name: sum(activities[i] == name for i in chosen) for name in set(activities)}
    assert counts == {"walk": 3, "sit": 4, "clap": 2}
    assert chosen == choose(activities, 9, seed=3) != choose(activities, 9, seed=4)
    assert choose(activities, 999, seed=0) == list(range(57))
