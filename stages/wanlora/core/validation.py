"""The validation loss: fixed clips x fixed noise levels x fixed noise, paired with the base model.

Owns: which clips and sigmas, and what is concluded from a table of losses: the only place where a
confidence interval is computed and worded. A number does not depend on the step, the rank or the
run, so two of them differ only by the model.
Legend: N clips, Q quantiles of the training density.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from wanlora.core.groups import FEW_GROUPS
from wanlora.core.rng import Stream, generator

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
        standard_error: Of the mean, between groups; None with a single group.
        ci95: 95 % confidence interval of the mean; None with a single group.
        num_groups: Number of groups.
    """

    mean: float
    standard_error: float | None
    ci95: tuple[float, float] | None
    num_groups: int


@dataclass(frozen=True)
class Report:
    """Conclusions from a table of losses. All means give each source group the same weight.

    Attributes:
        mean: Mean loss over source groups and sigmas.
        base_mean: The base model's.
        difference: mean - base_mean; below 0 is better than the base.
        standard_error: Of the difference, between source groups; None with a single group.
        ci95: 95 % confidence interval of the difference (Student's t over source groups).
        per_sigma: (sigma, loss, base loss) by rising sigma.
        per_activity: (loss, base loss) of each activity.
        num_clips: N.
        num_groups: Source groups of the clips.
    """

    mean: float
    base_mean: float
    difference: float
    standard_error: float | None
    ci95: tuple[float, float] | None
    per_sigma: tuple[tuple[float, float, float], ...]
    per_activity: dict[str, tuple[float, float]]
    num_clips: int
    num_groups: int


def num_due(end_step: int, *, every: int) -> int:
    """Number of validations of a run: every `every` steps and after the last one; 0 = never."""
    return -(-end_step // every) if every else 0


def choose(
    activities: Sequence[str], groups: Sequence[str], num_clips: int, *, seed: int
) -> list[int]:
    """Choose clips: evenly over activities, and in each activity from unused source groups first.

    Args:
        activities: Activity of each clip.
        groups: Source group of each clip.
        num_clips: Number of clips to choose; all of them when there are fewer.
        seed: The run's seed.

    Returns:
        Indices into `activities`, rising.
    """
    shuffled = generator(seed, Stream.VALIDATION, 2**32).permutation(len(activities))
    members: dict[str, list[int]] = {}
    for index in shuffled.tolist():
        members.setdefault(activities[index], []).append(index)
    taken: dict[str, int] = {}
    queues = [_least_taken_first(members[name], groups, taken) for name in sorted(members)]
    rounds = (next(queue, None) for _ in range(len(activities)) for queue in queues)
    chosen = (index for index in rounds if index is not None)
    return sorted(islice(chosen, min(num_clips, len(activities))))


def _least_taken_first(
    indices: list[int], groups: Sequence[str], taken: dict[str, int]
) -> Iterator[int]:
    """Yield clips in order, those of groups with fewer clips taken before the others."""
    rounds = _in_rounds(indices, groups)
    for number in count():
        if number == len(rounds):
            return
        for index in rounds[number]:
            times = taken.get(groups[index], 0)
            if times <= number:
                taken[groups[index]] = times + 1
                yield index
            else:  # other activities took clips of this group in the meantime
                rounds.extend([] for _ in range(times + 1 - len(rounds)))
                rounds[times].append(index)


def _in_rounds(indices: list[int], groups: Sequence[str]) -> list[list[int]]:
    """Split clips into rounds with at most one clip of each group."""
    seen: dict[str, int] = {}
    rounds: list[list[int]] = []
    for index in indices:
        number = seen.get(groups[index], 0)
        seen[groups[index]] = number + 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(index)
    return rounds


def summarize(
    losses: Float[np.ndarray, "n q"],
    base: Float[np.ndarray, "n q"],
    *,
    sigmas: Sequence[float],
    activities: Sequence[str],
    groups: Sequence[str],
) -> Report:
    """Pair a model's losses with the base's.

    Sigmas of one clip and clips of one source are not independent, so each source group gives one
    number. Paired, noise and difficulty cancel: a change of 0.5 % shows at about 53 pairs.

    Args:
        losses: Loss of each clip at each sigma.
        base: The base model's, on the same clips, sigmas and noise.
        sigmas: The Q sigmas.
        activities: Activity of each of the N clips.
        groups: Source group of each of the N clips.
    """
    assert losses.shape == base.shape == (len(activities), len(sigmas))
    losses, base = losses.astype(np.float64), base.astype(np.float64)
    interval = mean_interval((losses - base).mean(axis=1), groups)

    all_rows = range(len(groups))

    def mean(table: Float[np.ndarray, "n k"], rows: Sequence[int] = all_rows) -> float:
        means = group_means(table[list(rows)].mean(axis=1), [groups[row] for row in rows])
        return float(means.mean())

    by_activity: dict[str, list[int]] = {}
    for row, activity in enumerate(activities):
        by_activity.setdefault(activity, []).append(row)
    return Report(
        mean=mean(losses),
        base_mean=mean(base),
        difference=interval.mean,
        standard_error=interval.standard_error,
        ci95=interval.ci95,
        per_sigma=tuple(
            (float(sigma), mean(losses[:, [q]]), mean(base[:, [q]]))
            for q, sigma in enumerate(sigmas)
        ),
        per_activity={
            name: (mean(losses, rows), mean(base, rows))
            for name, rows in sorted(by_activity.items())
        },
        num_clips=len(activities),
        num_groups=interval.num_groups,
    )


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


def t95(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t; past 30 by Abramowitz and Stegun 26.7.5."""
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    z = _Z95
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
