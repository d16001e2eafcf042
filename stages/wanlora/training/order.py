"""The clips of each step's global batch, as a function of (seed, step).

Owns: the order of training. All clips of a global batch have the same bucket. Each bucket has a
stream: the permutations of its epochs in sequence, cut into full global batches; a remainder
continues in the next epoch. An epoch of a run has, shuffled, as many batches of each bucket as its
clips fill. The unfilled part of a batch counts in the next epoch, and its size before the first
epoch is drawn, so that small buckets are neither early nor late. With balanced activities, a stream
consists of rounds instead: each activity once per round, with a permutation of each activity's
clips.

A clip of weight w is in the permutation of epoch e floor((e + 1) w + u) - floor(e w + u) times,
with u in [0, 1) drawn for the clip. If w is an integer, this is exactly w times; after any number
of epochs it differs from the clip's share by less than one. Weights are integers in units of 2^-20,
so this arithmetic is exact. Without weights it is the order of release 0.1.0.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from wanlora.core.buckets import Bucket
from wanlora.core.rng import Stream, generator

# Slots of the order of buckets within an epoch and of what is left over before the first;
# permutations of clips use 1 + the bucket's rank, so no two share a counter.
_BUCKET_SLOT = 0
_LEFT_SLOT = 2**32 - 1
_ROUND = 2**31 - 1  # group number of the order of activities within a round
_OFFSETS = 2**63  # used instead of an epoch: the draws u of a group's clips
_EPOCHS_KEPT, _STEPS_KEPT, _COUNTS_KEPT = 4, 64, 32
_ONE = 2**20
"""A weight of 1. With weights up to 1000, counts are exact in int64 for 2^33 epochs."""

Ints = np.ndarray[tuple[int], np.dtype[np.int64]]


class GlobalBatch(NamedTuple):
    """One optimizer step's clips: indices into the bucket's own list, in slot order."""

    bucket: Bucket
    indices: tuple[int, ...]


class _Group(NamedTuple):
    """Clips that share permutations.

    Attributes:
        clips: Indices into the bucket's own list.
        weights: In units of 1 / _ONE; None = all 1.
        total: Sum of the weights, in the same units.
    """

    clips: Ints
    weights: Ints | None
    total: int


class Order:
    """The order of a run. Its state is only caches: a step always has the same batch.

    Args:
        sizes: Number of clips of each bucket; the mapping's own order does not matter.
        batch_size: Clips per global batch; one number for all buckets, or one per bucket.
        seed: The run's seed.
        activities: Activity of each clip of each bucket, to balance them; None = every clip once
            per epoch.
        weights: Weight of each clip of each bucket, from 0.001 to 1000; None = all 1.

    Attributes:
        draws_per_epoch: Sum of all weights: the number of clips when all are 1.
        bucket_steps_per_epoch: Steps of an epoch by bucket.
        steps_per_epoch: Steps of an epoch.
    """

    def __init__(
        self,
        sizes: Mapping[Bucket, int],
        *,
        batch_size: int | Mapping[Bucket, int],
        seed: int,
        activities: Mapping[Bucket, Sequence[str]] | None = None,
        weights: Mapping[Bucket, Sequence[float]] | None = None,
    ) -> None:
        assert sizes, "no clips"
        assert min(sizes.values()) >= 1, sizes
        if isinstance(batch_size, int):
            batch_size = dict.fromkeys(sizes, batch_size)
        units = {b: _units(weights[b]) if weights else None for b in sizes}
        totals = {
            b: n * _ONE if (w := units[b]) is None else int(w.sum()) for b, n in sizes.items()
        }
        self.draws_per_epoch = Fraction(sum(totals.values()), _ONE)
        self.bucket_steps_per_epoch = {
            bucket: Fraction(total, _ONE * batch_size[bucket]) for bucket, total in totals.items()
        }
        self.steps_per_epoch = sum(self.bucket_steps_per_epoch.values(), Fraction())
        self._buckets = sorted(sizes)
        unit = math.gcd(_ONE, *totals.values())  # without weights _ONE: counts stay small
        self._totals = np.array([totals[bucket] // unit for bucket in self._buckets])
        self._one = _ONE // unit
        self._batch_sizes = np.array([batch_size[bucket] for bucket in self._buckets])
        self._seed = seed
        self._left = generator(seed, Stream.ORDER, 0, _LEFT_SLOT).integers(self._batch_sizes)
        self._groups = [
            _groups(activities[b] if activities else [""] * sizes[b], units[b])
            for b in self._buckets
        ]
        num_groups = sum(len(groups) for groups in self._groups)
        self._permutation = lru_cache(maxsize=4 * num_groups + 4)(self._draw_permutation)
        self._round = lru_cache(maxsize=4 * len(sizes))(self._draw_round)
        self._offsets = lru_cache(maxsize=num_groups)(self._draw_offsets)
        self._drawn_before = lru_cache(maxsize=_COUNTS_KEPT * num_groups)(self._count_before)
        self._epoch = lru_cache(maxsize=_EPOCHS_KEPT)(self._draw_epoch)
        self._choice = lru_cache(maxsize=_STEPS_KEPT)(self._find_choice)

    def batch(self, step: int) -> GlobalBatch:
        """Global batch of a step, counted from 0."""
        rank, earlier = self._choice(step)
        size = int(self._batch_sizes[rank])
        first = earlier * size
        indices = tuple(self._clip(rank, position) for position in range(first, first + size))
        return GlobalBatch(self._buckets[rank], indices)

    def steps_by_bucket(self, end_step: int) -> dict[Bucket, int]:
        """Number of steps of each bucket before a step; some may have none."""
        if len(self._buckets) == 1:
            return {self._buckets[0]: end_step}
        epoch = self._run_epoch(end_step)
        before = self._before(epoch)
        ranks = self._epoch(epoch)[: end_step - int(before.sum())]
        counts = before + np.bincount(ranks, minlength=len(before))
        return dict(zip(self._buckets, counts.tolist(), strict=True))

    def epochs_until(self, bucket: Bucket) -> int:
        """Number of epochs with which a run has a step of this bucket."""
        rank = self._buckets.index(bucket)
        missing = int(self._batch_sizes[rank] - self._left[rank]) * self._one
        epochs = -(-missing // int(self._totals[rank]))
        # A run's steps are rounded over all buckets, so its end may be just before that step.
        while not self.steps_by_bucket(num_steps(self.steps_per_epoch, num_epochs=epochs))[bucket]:
            epochs += 1
        return epochs

    def _run_epoch(self, step: int) -> int:
        """Epoch of a run that a step is in, by the steps of all buckets before each epoch."""
        # Each bucket is less than a step away from its share, so the epoch is one of these.
        away, pace = len(self._buckets), self.steps_per_epoch
        epochs = range(max(0, int((step - away) / pace)), int((step + away) / pace) + 2)
        return epochs[bisect_right(epochs, step, key=lambda e: int(self._before(e).sum())) - 1]

    def _find_choice(self, step: int) -> tuple[int, int]:
        """Rank of a step's bucket, and that bucket's number of steps before it."""
        if len(self._buckets) == 1:
            return 0, step
        epoch = self._run_epoch(step)
        before, ranks = self._before(epoch), self._epoch(epoch)
        place = step - int(before.sum())
        rank = int(ranks[place])
        return rank, int(before[rank] + np.count_nonzero(ranks[:place] == rank))

    def _before(self, epoch: int) -> Ints:
        """Steps of each bucket before an epoch."""
        drawn = epoch * self._totals + self._left * self._one
        before: Ints = drawn // (self._batch_sizes * self._one)
        return before

    def _draw_epoch(self, epoch: int) -> Ints:
        """Ranks of the buckets of an epoch's steps."""
        counts = self._before(epoch + 1) - self._before(epoch)
        ranks = np.repeat(np.arange(len(counts)), counts)
        return generator(self._seed, Stream.ORDER, epoch, _BUCKET_SLOT).permutation(ranks)

    def _clip(self, rank: int, position: int) -> int:
        """Clip at a position of a bucket's stream."""
        groups = self._groups[rank]
        turn, place = divmod(position, len(groups))
        number = int(self._round(rank, turn)[place]) if len(groups) > 1 else 0
        if groups[number].weights is None:
            epoch, place = divmod(turn, len(groups[number].clips))
        else:
            epoch = self._find_epoch(rank, number, turn)
            place = turn - self._drawn_before(rank, number, epoch)
        return int(self._permutation(rank, number, epoch)[place])

    def _find_epoch(self, rank: int, number: int, turn: int) -> int:
        """Epoch of a draw of a weighted group.

        Before epoch e there are e times the group's weight, within one draw per clip.
        """
        clips, _, total = self._groups[rank][number]
        first = max(0, (turn - len(clips)) * _ONE // total)
        epochs = range(first, (turn + len(clips)) * _ONE // total + 2)
        before = partial(self._drawn_before, rank, number)
        return epochs[bisect_right(epochs, turn, key=before) - 1]

    def _count_before(self, rank: int, number: int, epoch: int) -> int:
        """Draws of a weighted group before an epoch."""
        return int(self._copies_before(rank, number, epoch).sum())

    def _copies_before(self, rank: int, number: int, epoch: int) -> Ints:
        """Draws of each clip of a weighted group before an epoch."""
        weights = self._groups[rank][number].weights
        assert weights is not None
        copies: Ints = (epoch * weights + self._offsets(rank, number)) // _ONE
        return copies

    def _draw_offsets(self, rank: int, number: int) -> Ints:
        size = len(self._groups[rank][number].clips)
        slot = _slot(rank, number)
        return generator(self._seed, Stream.ORDER, _OFFSETS, slot).integers(_ONE, size=size)

    def _draw_permutation(self, rank: int, number: int, epoch: int) -> Ints:
        """Clips of a group in the order of an epoch."""
        clips, weights, _ = self._groups[rank][number]
        if weights is not None:
            before, after = (self._copies_before(rank, number, e) for e in (epoch, epoch + 1))
            clips = np.repeat(clips, after - before)
        draw = generator(self._seed, Stream.ORDER, epoch, _slot(rank, number))
        return clips[draw.permutation(len(clips))]

    def _draw_round(self, rank: int, turn: int) -> Ints:
        """Groups of a bucket in the order of a round."""
        draw = generator(self._seed, Stream.ORDER, turn, _slot(rank, _ROUND))
        return draw.permutation(len(self._groups[rank]))


def _slot(rank: int, number: int) -> int:
    return 1 + rank + (number << 32)


def _units(weights: Sequence[float]) -> Ints | None:
    """Weights in units of 1 / _ONE; None if all are 1."""
    units = np.rint(np.asarray(weights, np.float64) * _ONE).astype(np.int64)
    assert units.min() >= 1, "a weight is too small"
    return None if (units == _ONE).all() else units


def _groups(activities: Sequence[str], units: Ints | None) -> list[_Group]:
    """Clips of each activity, by its name, with their weights."""
    members: dict[str, list[int]] = {}
    for index, activity in enumerate(activities):
        members.setdefault(activity, []).append(index)
    clips = [np.array(members[name]) for name in sorted(members)]
    if units is None:
        return [_Group(own, None, len(own) * _ONE) for own in clips]
    return [_Group(own, units[own], int(units[own].sum())) for own in clips]


def describe_untrained(
    order: Order, sizes: Mapping[Bucket, int], batch_size: Mapping[Bucket, int], *, end_step: int
) -> list[str]:
    """Messages about buckets without a step in a run, with the reason and how to train them.

    Args:
        order: Order of the run.
        sizes: Number of clips of each bucket.
        batch_size: Clips in a global batch of each bucket.
        end_step: Steps of the run.
    """
    return [
        f"bucket {bucket} is never trained in this run of {end_step} steps: a step of it takes "
        f"{batch_size[bucket]} clips, and it has {sizes[bucket]}. To train it: --num-epochs "
        f"{order.epochs_until(bucket)} or more, a smaller global batch, more such clips, or a "
        "higher weight for them"
        + (", or --batch-by clips" if len(set(batch_size.values())) > 1 else "")
        for bucket, steps in order.steps_by_bucket(end_step).items()
        if not steps
    ]


def num_steps(steps_per_epoch: Fraction, *, num_epochs: float) -> int:
    """Optimizer steps of a number of epochs, rounded up."""
    return max(1, math.ceil(steps_per_epoch * Fraction(num_epochs).limit_denominator(10**6)))
