import math

import numpy as np
import pytest
import torch
from scipy import special, stats

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


BOUNDARY = 0.875
EXPERTS = {"high": (BOUNDARY, 1.0), "low": (0.0, BOUNDARY)}
EDGES = [*np.linspace(1e-12, 1 - 1e-12, 501), 1e-300, 1 - 2**-53]


def distribution(sampler: str, shift: float):
    """The unrestricted distribution function of sigma, written from the densities' definitions."""
    grid = np.linspace(0, 1, 200_001)
    curve = 1 - grid - 1.29 * (np.cos(np.pi * grid / 2) ** 2 - 1 + grid)

    def below(sigma):
        t = np.asarray(sigma) / (shift - (shift - 1) * np.asarray(sigma))
        if sampler == "logit_normal":
            return stats.norm.cdf(special.logit(t))
        if sampler == "uniform":
            return t
        return 1 - np.interp(t, curve[::-1], grid[::-1])

    return below


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("sampler", flow.SAMPLERS)
def test_a_range_keeps_the_shape_of_the_density_in_it(sampler, shift, expert):
    low, high = EXPERTS[expert]
    draws = [
        flow.sigma_of(
            uniform(5, Stream.SIGMA, step), sampler=sampler, shift=shift, sigmas=EXPERTS[expert]
        )
        for step in range(3000)
    ]
    assert all(low <= sigma < high for sigma in draws)
    below = distribution(sampler, shift)
    share = below(high) - below(low)
    assert stats.kstest(draws, lambda s: (below(s) - below(low)) / share).pvalue > 1e-3
    found = flow.share_of(EXPERTS[expert], sampler=sampler, shift=shift)
    assert found == pytest.approx(float(share), abs=1e-6)


@pytest.mark.parametrize(
    ("sampler", "shift", "share"),
    [("logit_normal", 3, 0.198), ("uniform", 3, 0.30), ("logit_normal", 12, 0.705),
     ("uniform", 12, 0.632)],
)  # fmt: skip
def test_the_high_noise_expert_has_its_published_share_of_the_draws(sampler, shift, share):
    found = flow.share_of(EXPERTS["high"], sampler=sampler, shift=shift)
    assert found == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize("sampler", flow.SAMPLERS)
def test_all_sigmas_are_bit_for_bit_the_unrestricted_ones(sampler):
    for u in EDGES[1:-2]:
        plain = flow.shift_sigma(flow.SAMPLERS[sampler](u), 3.0)
        assert flow.sigma_of(u, sampler=sampler, shift=3.0, sigmas=(0.0, 1.0)) == plain
    assert flow.share_of((0.0, 1.0), sampler=sampler, shift=3.0) == 1.0


@pytest.mark.parametrize("boundary", [0.875, 0.9])  # the first is a float32, the second is not
@pytest.mark.parametrize("sampler", flow.SAMPLERS)
def test_no_rounding_moves_a_draw_over_the_boundary(sampler, boundary):
    for u in EDGES:
        low, high = (
            float(torch.tensor(flow.sigma_of(u, sampler=sampler, shift=3.0, sigmas=sigmas)))
            for sigmas in ((0.0, boundary), (boundary, 1.0))
        )
        timesteps = flow.timesteps(torch.tensor([low, high]))
        # diffusers' choice of a transformer, in WanPipeline.__call__
        assert [bool(t >= boundary * 1000) for t in timesteps] == [False, True]
        assert high <= 1.0


@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.947])
def test_the_experts_meet_at_the_float32_at_which_diffusers_changes_them(boundary):
    """float32(0.9) is below 0.9, and 1000 times it is the timestep 900: the high expert's."""
    sigmas = [np.float32(boundary)]
    for _ in range(100):
        sigmas.append(np.nextafter(sigmas[-1], np.float32(1)))
        sigmas.insert(0, np.nextafter(sigmas[0], np.float32(0)))
    timesteps = flow.timesteps(torch.tensor(np.array(sigmas)))
    is_high = [bool(t >= boundary * 1000) for t in timesteps]
    assert sorted(is_high) == is_high
    assert {True, False} == set(is_high)
    for sigma, expected in zip(map(float, sigmas), is_high, strict=True):
        assert (flow._inside(sigma, (boundary, 1.0)) == sigma) == expected
        assert (flow._inside(sigma, (0.0, boundary)) == sigma) == (not expected)


@pytest.mark.parametrize("sampler", flow.SAMPLERS)
def test_the_grids_of_two_experts_joined_by_their_shares_give_the_expectation(sampler):
    whole = np.mean(np.square(flow.sigma_grid(2000, sampler=sampler, shift=3.0)))
    joined = sum(
        flow.share_of(sigmas, sampler=sampler, shift=3.0)
        * np.mean(np.square(flow.sigma_grid(1000, sampler=sampler, shift=3.0, sigmas=sigmas)))
        for sigmas in EXPERTS.values()
    )
    assert joined == pytest.approx(whole, abs=1e-6)


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
