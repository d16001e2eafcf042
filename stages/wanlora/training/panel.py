"""The fixed clips of a run's validation loss, and the comparison of their losses with the base's.

Owns: the choice of clips, the number of validations of a run, and the statistics of a table of
losses. A loss does not depend on the step, the rank or the run, so two losses differ only because
of the model. Must not know: stores, transformers.
Legend: N clips, Q quantiles of the training density.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
from jaxtyping import Float

from wanlora.core.intervals import group_means, mean_interval
from wanlora.core.rng import Stream, generator


@dataclass(frozen=True)
class Report:
    """Statistics of a table of losses. All means give each source group the same weight.

    Attributes:
        mean: Mean loss over source groups and sigmas.
        base_mean: Mean loss of the base model.
        difference: mean - base_mean; below 0 is better than the base.
        standard_error: Standard error of the difference between source groups; None with one group.
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
        num_clips: Number of clips to choose; all of them if there are fewer.
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
    """Compare a model's losses with the base's, pair by pair.

    Sigmas of one clip and clips of one source are not independent, so each source group gives one
    number. Paired, noise and difficulty cancel: a change of 0.5 % shows at about 53 pairs.

    Args:
        losses: Loss of each clip at each sigma.
        base: Losses of the base model on the same clips, sigmas and noise.
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
