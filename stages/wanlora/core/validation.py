"""The validation loss: fixed clips x fixed noise levels x fixed noise, paired with the base model.

Owns: which sigmas, and what is concluded from a table of losses. A number does not depend on the
step, the rank or the run, so two of them differ only by the model.
Legend: N clips, Q quantiles of the training density.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from wanlora.core import flow
from wanlora.core.rng import Stream, generator

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom (any table of it).
_T95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
_Z95 = 1.959964


@dataclass(frozen=True)
class Report:
    """What a table of losses says about a model.

    Attributes:
        mean: Mean loss over clips and sigmas.
        base_mean: The base model's.
        difference: mean - base_mean; below 0 is better than the base.
        standard_error: Of the difference, clustered by clip; None with a single clip.
        ci95: 95 % confidence interval of the difference (Student's t over clips).
        per_sigma: (sigma, loss, base loss) by rising sigma.
        per_activity: (loss, base loss) of each activity.
        num_clips: N.
    """

    mean: float
    base_mean: float
    difference: float
    standard_error: float | None
    ci95: tuple[float, float] | None
    per_sigma: tuple[tuple[float, float, float], ...]
    per_activity: dict[str, tuple[float, float]]
    num_clips: int


def sigma_grid(num_sigmas: int, *, sampler: str, shift: float) -> list[float]:
    """Midpoints of equal shares of the training density, so that their mean is its expectation."""
    return sorted(
        flow.sigma_of((q + 0.5) / num_sigmas, sampler=sampler, shift=shift)
        for q in range(num_sigmas)
    )


def choose(activities: Sequence[str], num_clips: int, *, seed: int) -> list[int]:
    """Choose clips, as many of each activity as possible: a round over the activities at a time.

    Args:
        activities: Activity of each clip.
        num_clips: How many to choose; all, when there are fewer.
        seed: The run's seed.

    Returns:
        Indices into `activities`, rising.
    """
    shuffled = generator(seed, Stream.VALIDATION, 2**32).permutation(len(activities))
    by_activity: dict[str, list[int]] = {}
    for index in shuffled:
        by_activity.setdefault(activities[index], []).append(int(index))
    rounds = max((len(members) for members in by_activity.values()), default=0)
    chosen = [
        by_activity[activity][position]
        for position in range(rounds)
        for activity in sorted(by_activity)
        if position < len(by_activity[activity])
    ]
    return sorted(chosen[:num_clips])


def summarize(
    losses: Float[np.ndarray, "n q"],
    base: Float[np.ndarray, "n q"],
    *,
    sigmas: Sequence[float],
    activities: Sequence[str],
) -> Report:
    """Pair a model's losses with the base's.

    The standard error is that of the clips' mean differences: sigmas of one clip are not
    independent. Paired, noise and difficulty cancel: a change of 0.5 % shows at about 53 pairs.

    Args:
        losses: Loss of each clip at each sigma.
        base: The base model's, on the same clips, sigmas and noise.
        sigmas: The Q sigmas.
        activities: Activity of each of the N clips.
    """
    assert losses.shape == base.shape == (len(activities), len(sigmas))
    losses, base = losses.astype(np.float64), base.astype(np.float64)
    difference, error, interval = mean_interval((losses - base).mean(axis=1))
    names = np.array(activities)
    return Report(
        mean=float(losses.mean()),
        base_mean=float(base.mean()),
        difference=difference,
        standard_error=error,
        ci95=interval,
        per_sigma=tuple(
            (float(sigma), float(losses[:, q].mean()), float(base[:, q].mean()))
            for q, sigma in enumerate(sigmas)
        ),
        per_activity={
            name: (float(losses[names == name].mean()), float(base[names == name].mean()))
            for name in sorted(set(activities))
        },
        num_clips=len(activities),
    )


def mean_interval(
    values: Float[np.ndarray, " n"],
) -> tuple[float, float | None, tuple[float, float] | None]:
    """Mean of independent values, its standard error, and its 95 % interval by Student's t.

    Of a single value, neither error nor interval is known.
    """
    mean = float(values.mean())
    if len(values) < 2:
        return mean, None, None
    error = float(values.std(ddof=1) / math.sqrt(len(values)))
    reach = t95(len(values) - 1) * error
    return mean, error, (mean - reach, mean + reach)


def t95(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t; past 30 by Abramowitz and Stegun 26.7.5."""
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    z = _Z95
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
