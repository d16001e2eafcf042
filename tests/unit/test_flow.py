import math

import numpy as np
import pytest
import torch
from scipy import stats

from wanlora.core.rng import Stream, uniform
from wanlora.training import flow


def test_mixture_and_target_are_those_of_a_straight_path():
    latents, noise = torch.randn(2, 16, 3, 4, 5), torch.randn(2, 16, 3, 4, 5)
    sigmas = torch.tensor([0.25, 0.9])
    mixed = flow.mix(latents, noise, sigmas)
    target = flow.velocity_target(latents, noise)
    # Following the velocity back from sigma reaches the data, and forward to 1 the noise.
    back = mixed - sigmas.view(-1, 1, 1, 1, 1) * target
    forward = mixed + (1 - sigmas).view(-1, 1, 1, 1, 1) * target
    torch.testing.assert_close(back, latents)
    torch.testing.assert_close(forward, noise)


def test_timesteps_are_float32_and_not_truncated():
    assert flow.timesteps(torch.tensor([0.12345])).item() == pytest.approx(123.45, rel=1e-6)
    with pytest.raises(AssertionError):
        flow.timesteps(torch.tensor([0.5], dtype=torch.bfloat16))


def test_logit_normal_has_the_density_of_its_definition():
    draws = np.array([flow.logit_normal(uniform(3, Stream.SIGMA, i)) for i in range(4000)])
    logits = np.log(draws / (1 - draws))
    assert stats.kstest(logits, "norm").pvalue > 1e-3


# Quantiles of 5, 25, 50, 75 and 95 % and P(s < 0.25), tabulated independently for these densities.
@pytest.mark.parametrize(
    ("sampler", "shift", "quantiles", "below"),
    [
        ("logit_normal", 3.0, (0.367, 0.604, 0.750, 0.855, 0.939), 0.014),
        ("uniform", 3.0, (0.136, 0.500, 0.750, 0.900, 0.983), 0.10),
        ("logit_normal", 1.0, (0.162, 0.337, 0.500, 0.662, 0.838), 0.136),
        ("uniform", 5.0, (0.208, 0.625, 0.833, 0.937, 0.990), 0.06),
    ],
)
def test_shifted_densities_have_their_tabulated_quantiles(sampler, shift, quantiles, below):
    found = [flow.sigma_of(q, sampler=sampler, shift=shift) for q in (0.05, 0.25, 0.5, 0.75, 0.95)]
    assert found == pytest.approx(quantiles, abs=1.5e-3)
    grid = [flow.sigma_of((i + 0.5) / 2000, sampler=sampler, shift=shift) for i in range(2000)]
    assert np.mean(np.array(grid) < 0.25) == pytest.approx(below, abs=5e-3)


def test_mode_density_stays_inside_the_interval_and_has_its_median_at_half():
    values = [flow.mode(u) for u in np.linspace(0.001, 0.999, 99)]
    assert all(0 < value < 1 for value in values)
    assert flow.mode(0.5) == pytest.approx(0.5)


def test_bsmntw_weights_average_one_over_uniform_timesteps():
    weights = [flow.WEIGHTINGS["bsmntw"]((i + 0.5) / 5000) for i in range(5000)]
    assert np.mean(weights) == pytest.approx(1.0, abs=1e-3)
    assert max(weights) == weights[int(np.argmax(weights))]
    assert math.isclose(flow.WEIGHTINGS["bsmntw"](1.0), 0.0, abs_tol=1e-12)


def test_loss_is_the_mean_over_each_clip_in_fp32():
    prediction = torch.randn(3, 16, 2, 4, 4).to(torch.bfloat16)
    target = torch.randn(3, 16, 2, 4, 4)
    losses = flow.loss_per_clip(prediction, target)
    for i in range(3):
        expected = ((prediction[i].double() - target[i].double()) ** 2).mean()
        assert losses[i].item() == pytest.approx(expected.item(), rel=1e-6)
    assert losses.dtype == torch.float32
