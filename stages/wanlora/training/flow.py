"""Flow matching: interpolation between data and noise, and the velocity target.

Owns: sigma densities and their restriction to a range, the shift, the mixture, the velocity target
and the loss.
Legend: B batch, C channels, F latent frames, H W latent size. sigma in [0, 1], 1 = pure noise.
Source: Esser et al. 2024 (SD3), sections 2 and 3.1; diffusers FlowMatchEulerDiscreteScheduler.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000.0

Range = tuple[float, float]
"""Range of sigma. A lower bound above 0 is included, an upper bound below 1 is not."""

ALL_SIGMAS: Range = (0.0, 1.0)

_BELOW_ONE = math.nextafter(1.0, 0.0)


def logit_normal(u: float) -> float:
    """Quantile of logit-normal(0, 1): sigmoid(Phi^-1(u)). SD3 eq. 19 with m = 0, s = 1."""
    return 1.0 / (1.0 + math.exp(-NormalDist().inv_cdf(u)))


def mode(u: float, scale: float = 1.29) -> float:
    """Quantile of SD3's mode density: 1 - u - s(cos^2(pi u / 2) - 1 + u). SD3 eq. 20."""
    return 1.0 - u - scale * (math.cos(math.pi * u / 2) ** 2 - 1.0 + u)


SAMPLERS: dict[str, Callable[[float], float]] = {
    "logit_normal": logit_normal,
    "uniform": lambda u: u,
    "mode": mode,
}


_INVERSES: dict[str, Callable[[float], float]] = {
    "logit_normal": lambda sigma: NormalDist().cdf(math.log(sigma / (1.0 - sigma))),
    "uniform": lambda sigma: sigma,
}
"""Inverses of `SAMPLERS` in (0, 1) that have a closed form; the others are found by bisection."""


def shift_sigma(sigma: float, shift: float) -> float:
    """Move sigma towards noise, once: shift s / (1 + (shift - 1) s). SD3 eq. 23."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def sigma_of(u: float, *, sampler: str, shift: float, sigmas: Range = ALL_SIGMAS) -> float:
    """Sigma of a uniform draw: its quantile in the sampler's density, then the shift.

    In a range, u is first mapped to the draws that give a sigma of the range. The density in the
    range is then the unrestricted one divided by its share there: its shape is kept.

    Args:
        u: In (0, 1).
        sampler: A key of `SAMPLERS`.
        shift: Above 0; 1 does not change sigma, 3 is Wan's at 480p.
        sigmas: Range of the result.
    """
    low, high = _draws(sampler, shift, sigmas)
    draw = min(low + (high - low) * u, _BELOW_ONE)  # the sum may round to 1, which has no quantile
    return _inside(shift_sigma(SAMPLERS[sampler](draw), shift), sigmas)


def share_of(sigmas: Range, *, sampler: str, shift: float) -> float:
    """Share of the unrestricted draws whose sigma is in a range."""
    low, high = _draws(sampler, shift, sigmas)
    return high - low


def sigma_grid(
    num_sigmas: int, *, sampler: str, shift: float, sigmas: Range = ALL_SIGMAS
) -> list[float]:
    """Midpoints of equal shares of the training density, so that their mean is its expectation."""
    return sorted(
        sigma_of((q + 0.5) / num_sigmas, sampler=sampler, shift=shift, sigmas=sigmas)
        for q in range(num_sigmas)
    )


@lru_cache
def _draws(sampler: str, shift: float, sigmas: Range) -> Range:
    """Range of the uniform draw that gives a range of sigma; exactly (0, 1) for all sigmas."""
    first, last = (_draw_of(sigma, sampler, shift) for sigma in sigmas)
    return min(first, last), max(first, last)


def _draw_of(sigma: float, sampler: str, shift: float) -> float:
    """Uniform draw that gives a sigma: the inverse of `sigma_of`."""
    quantile = SAMPLERS[sampler]
    if sigma in ALL_SIGMAS:  # the ends, without rounding; mode falls from 1 to 0
        return 1.0 - sigma if sampler == "mode" else sigma
    unshifted = shift_sigma(sigma, 1.0 / shift)
    if sampler in _INVERSES:
        return _INVERSES[sampler](unshifted)
    low, high = 0.0, 1.0
    is_rising = quantile(0.75) > quantile(0.25)
    while low < (middle := (low + high) / 2) < high:
        is_below = quantile(middle) < unshifted
        low, high = (middle, high) if is_below == is_rising else (low, middle)
    return middle


def _inside(sigma: float, sigmas: Range) -> float:
    """Keep rounding, also that to float32, from moving a sigma over an inner bound of its range."""
    low, high = sigmas
    if low > 0.0:
        sigma = max(sigma, float(_first_from(low)))
    if high < 1.0:
        sigma = min(sigma, float(np.nextafter(_first_from(high), np.float32(0))))
    return sigma


@lru_cache
def _first_from(bound: float) -> np.float32:
    """Smallest float32 sigma for which diffusers runs the transformer above a bound.

    It compares timesteps, t >= 1000 bound: float32(0.9) is below 0.9, and its timestep is 900.
    """
    timestep, scale = np.float32(NUM_TRAIN_TIMESTEPS * bound), np.float32(NUM_TRAIN_TIMESTEPS)
    sigma = np.float32(bound) + np.float32(4e-7)
    while scale * (below := np.nextafter(sigma, np.float32(0))) >= timestep:
        sigma = below
    return sigma


def _bsmntw(sigma: float) -> float:
    """Bell around 0.5, mean about 1 over uniform timesteps (DiffSynth-Studio's training weight)."""
    t = sigma * NUM_TRAIN_TIMESTEPS

    def bell(x: float) -> float:
        return math.exp(-2.0 * ((x - 500.0) / NUM_TRAIN_TIMESTEPS) ** 2)

    floor = bell(NUM_TRAIN_TIMESTEPS)
    # Mean of the bell over [0, 1000], so that the weight does not rescale the learning rate.
    mean = math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5)) - floor
    return (bell(t) - floor) / mean


WEIGHTINGS: dict[str, Callable[[float], float]] = {
    "none": lambda _sigma: 1.0,
    "bsmntw": _bsmntw,
    "sigma_sqrt": lambda sigma: sigma**-2.0,  # diffusers compute_loss_weighting_for_sd3
}
"""Functions of sigma alone: the runs of two experts have the weights that one run would have."""


def mix(
    latents: Float[Tensor, "b c f h w"],
    noise: Float[Tensor, "b c f h w"],
    sigmas: Float[Tensor, " b"],
) -> Float[Tensor, "b c f h w"]:
    """Noisy latents (1 - s) x0 + s noise, in fp32; cast to the transformer's type afterwards."""
    s = sigmas.view(-1, 1, 1, 1, 1)
    return (1.0 - s) * latents + s * noise


def velocity_target(
    latents: Float[Tensor, "b c f h w"], noise: Float[Tensor, "b c f h w"]
) -> Float[Tensor, "b c f h w"]:
    """Target of the transformer: d x_s / d s = noise - x0."""
    return noise - latents


def timesteps(sigmas: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """1000 sigma in float32: bf16 would be off by up to 2, truncation by up to 1."""
    assert sigmas.dtype == torch.float32, sigmas.dtype
    return NUM_TRAIN_TIMESTEPS * sigmas


def loss_per_clip(
    prediction: Float[Tensor, "b c f h w"], target: Float[Tensor, "b c f h w"]
) -> Float[Tensor, " b"]:
    """Mean squared error of each clip, in fp32."""
    return (prediction.float() - target).square().mean(dim=(1, 2, 3, 4))
