"""Means over source groups: their 95 % intervals, conclusions from them, and enough groups for one.

Owns: the computation and the wording of every confidence interval, and the number of source groups
that must be held out. Imports no torch: `prepare` counts groups too. Must not know: models,
clips, files.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

FEW_GROUPS = 6
"""With fewer source groups an interval is called wide: from 2.78 standard errors (5 groups) to 12.7
(2 groups) to either side, against 1.96 with many."""
UNDECIDED = "too few source groups to decide"

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom (any table of it).
_T95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
_Z95 = 1.959964


class MeanInterval(NamedTuple):
    """Mean of values whose groups are independent.

    Attributes:
        mean: Mean over groups of their mean values.
        standard_error: Standard error of the mean, between groups; None with a single group.
        ci95: 95 % confidence interval of the mean; None with a single group.
        num_groups: Number of groups.
    """

    mean: float
    standard_error: float | None
    ci95: tuple[float, float] | None
    num_groups: int


def group_means(values: Float[np.ndarray, " n"], groups: Sequence[str]) -> Float[np.ndarray, " g"]:
    """Mean value of each group, in the order of their first values."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    of_value = [numbers[group] for group in groups]
    return np.bincount(of_value, weights=values) / np.bincount(of_value)


def mean_interval(values: Float[np.ndarray, " n"], groups: Sequence[str]) -> MeanInterval:
    """Mean over groups, and its 95 % interval by Student's t over their means.

    Values of one group may depend on each other: clips of one video do. An interval over all values
    would then be too narrow (`bench/coverage.py`).

    Args:
        values: The values, for example each clip's difference to the base.
        groups: Group of each value; groups are independent.
    """
    means = group_means(values, groups)
    mean, num_groups = float(means.mean()), len(means)
    if num_groups < 2:
        return MeanInterval(mean, None, None, num_groups)
    error = float(means.std(ddof=1) / math.sqrt(num_groups))
    reach = t95(num_groups - 1) * error
    return MeanInterval(mean, error, (mean - reach, mean + reach), num_groups)


def describe_sample(num_clips: int, num_groups: int | None) -> str:
    """Clips and source groups of an interval, and whether the groups are too few for a narrow one.

    Args:
        num_clips: Number of clips.
        num_groups: Number of source groups; None in results of release 0.1.0.
    """
    clips = f"{num_clips} clip{'s' * (num_clips != 1)}"
    if num_groups is None:
        return clips
    if num_groups == 1:
        return f"{clips} of one source group, so no interval"
    wide = ", so a wide interval" if num_groups < FEW_GROUPS else ""
    return f"{clips} of {num_groups} source groups{wide}"


def describe_change(
    difference: float, base: float, ci95: Sequence[float] | None, *, decimals: int = 2
) -> str:
    """Format a difference in % of the base: `-2.31 %, 95 % interval -3.10 to -1.52 %`.

    Args:
        difference: Difference to the base.
        base: Value of the base.
        ci95: Interval of the difference; None without one.
        decimals: Number of decimals.
    """
    change = f"{100 * difference / base:+.{decimals}f} %"
    return f"{change}, {describe_interval(ci95, base, decimals=decimals)}" if ci95 else change


def describe_interval(ci95: Sequence[float], base: float, *, decimals: int = 2) -> str:
    """Format the interval of a difference in % of the base; arguments as `describe_change`."""
    low, high = (100 * end / base for end in ci95)
    return f"95 % interval {low:+.{decimals}f} to {high:+.{decimals}f} %"


def t95(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t; past 30 by Abramowitz and Stegun 26.7.5."""
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    z = _Z95
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def describe_few_groups(num_held_out: int, num_groups: int) -> str | None:
    """Warning that too little is held out to measure a run, with what to do; None if enough is.

    Args:
        num_held_out: Source groups held out.
        num_groups: Source groups in all, at least 1.
    """
    if num_held_out >= FEW_GROUPS:
        return None
    found = f"held out: {num_held_out} of {num_groups} source groups (videos)"
    found += (
        f". With fewer than {FEW_GROUPS}, the interval of the held-out loss is so wide that it "
        "seldom shows what was learned"
        if num_held_out
        else ". There is no held-out loss, no comparison with the base and no best checkpoint"
    )
    share = fraction_for(FEW_GROUPS, num_groups)
    if share is None:
        return (
            f"{found}. Use at least {2 * FEW_GROUPS} source groups, and hold out {FEW_GROUPS} of "
            "them: wanlora prepare --val-fraction 0.5"
        )
    return f"{found}. Hold out {FEW_GROUPS} or more: wanlora prepare --val-fraction {share:g}"


def conclusion(ci95: Sequence[float] | None, num_groups: int | None) -> str:
    """Conclusion from a difference to the base: lower or higher only if the interval shows it.

    Args:
        ci95: Interval of the difference; None without one.
        num_groups: Source groups that were measured; None in records of releases before 0.2.
    """
    if ci95 is None or (num_groups is not None and num_groups < FEW_GROUPS):
        return UNDECIDED
    low, high = ci95
    return "lower" if high < 0 else "higher" if low > 0 else "no difference shown"


def fraction_for(num_held_out: int, num_groups: int) -> float | None:
    """Smallest multiple of 0.05 that holds out a number of groups; None if it is over 0.5."""
    share = math.ceil(20 * num_held_out / num_groups) / 20
    return share if share <= 0.5 else None
