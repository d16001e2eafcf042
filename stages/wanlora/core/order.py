"""Which clips make up the global batch of each step, as a function of (seed, step).

Owns: the order of training. A global batch holds one bucket. Each bucket has its own stream: its
epoch permutations end to end, cut into full global batches, the remainder running on into the next
epoch. An epoch of a run has, shuffled, as many batches of each bucket as its clips fill; what is
left of a batch counts in the next epoch, and how much is left over before the first is drawn, so
that small buckets come neither early nor late. Balanced, a stream is made of rounds instead: every
activity once a round, each activity's clips in its own permutations.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from wanlora.core.buckets import Bucket
from wanlora.core.rng import Stream, generator

# Slots of the order of buckets within an epoch and of what is left over before the first;
# permutations of clips use 1 + the bucket's rank, so no two share a counter.
_BUCKET_SLOT = 0
_LEFT_SLOT = 2**32 - 1
_ROUND = 2**31 - 1  # group number of the order of activities within a round
_EPOCHS_KEPT, _STEPS_KEPT = 4, 64


class GlobalBatch(NamedTuple):
    """One optimizer step's clips: indices into the bucket's own list, in slot order."""

    bucket: Bucket
    indices: tuple[int, ...]


class Order:
    """The order of a run. Holds only memos; asking twice gives the same.

    Args:
        sizes: Number of clips of each bucket; the mapping's own order does not matter.
        batch_size: Clips in a global batch, of every bucket or of each.
        seed: The run's seed.
        activities: Activity of each clip of each bucket, to balance them; None = every clip once
            an epoch.
    """

    def __init__(
        self,
        sizes: Mapping[Bucket, int],
        *,
        batch_size: int | Mapping[Bucket, int],
        seed: int,
        activities: Mapping[Bucket, Sequence[str]] | None = None,
    ) -> None:
        assert sizes, "no clips"
        assert min(sizes.values()) >= 1, sizes
        if isinstance(batch_size, int):
            batch_size = dict.fromkeys(sizes, batch_size)
        self.steps_per_epoch = steps_per_epoch(sizes, batch_size)
        self._buckets = sorted(sizes)
        self._sizes = np.array([sizes[bucket] for bucket in self._buckets])
        self._batch_sizes = np.array([batch_size[bucket] for bucket in self._buckets])
        self._seed = seed
        self._left = generator(seed, Stream.ORDER, 0, _LEFT_SLOT).integers(self._batch_sizes)
        self._groups = [
            _members(activities[bucket]) if activities else [list(range(sizes[bucket]))]
            for bucket in self._buckets
        ]
        num_groups = sum(len(groups) for groups in self._groups)
        self._permutation = lru_cache(maxsize=4 * num_groups + 4)(self._draw_permutation)
        self._epoch = lru_cache(maxsize=_EPOCHS_KEPT)(self._draw_epoch)
        self._choice = lru_cache(maxsize=_STEPS_KEPT)(self._find_choice)

    def batch(self, step: int) -> GlobalBatch:
        """Global batch of a step, counted from 0."""
        rank, earlier = self._choice(step)
        size = int(self._batch_sizes[rank])
        first = earlier * size
        indices = tuple(self._clip(rank, position) for position in range(first, first + size))
        return GlobalBatch(self._buckets[rank], indices)

    def _find_choice(self, step: int) -> tuple[int, int]:
        """Rank of a step's bucket, and that bucket's number of steps before it."""
        if len(self._buckets) == 1:
            return 0, step
        # Each bucket is less than a step away from its share, so the epoch is one of these.
        away, pace = len(self._buckets), self.steps_per_epoch
        epochs = range(max(0, int((step - away) / pace)), int((step + away) / pace) + 2)
        epoch = epochs[bisect_right(epochs, step, key=lambda e: self._before(e).sum()) - 1]
        before, ranks = self._before(epoch), self._epoch(epoch)
        place = step - int(before.sum())
        rank = int(ranks[place])
        return rank, int(before[rank] + np.count_nonzero(ranks[:place] == rank))

    def _before(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Steps of each bucket before an epoch."""
        before: np.ndarray[tuple[int], np.dtype[np.int64]]
        before = (epoch * self._sizes + self._left) // self._batch_sizes
        return before

    def _draw_epoch(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Ranks of the buckets of an epoch's steps."""
        counts = self._before(epoch + 1) - self._before(epoch)
        ranks = np.repeat(np.arange(len(counts)), counts)
        return generator(self._seed, Stream.ORDER, epoch, _BUCKET_SLOT).permutation(ranks)

    def _clip(self, rank: int, position: int) -> int:
        """Clip at a position of a bucket's stream."""
        groups = self._groups[rank]
        turn, place = divmod(position, len(groups))
        group = (
            int(self._permutation(rank, len(groups), turn, _ROUND)[place]) if len(groups) > 1 else 0
        )
        members = groups[group]
        epoch, place = divmod(turn, len(members))
        return members[int(self._permutation(rank, len(members), epoch, group)[place])]

    def _draw_permutation(
        self, rank: int, size: int, epoch: int, group: int
    ) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        slot = 1 + rank + (group << 32)
        return generator(self._seed, Stream.ORDER, epoch, slot).permutation(size)


def _members(activities: Sequence[str]) -> list[list[int]]:
    """Indices of each activity, by its name."""
    members: dict[str, list[int]] = {}
    for index, activity in enumerate(activities):
        members.setdefault(activity, []).append(index)
    return [members[name] for name in sorted(members)]


def steps_per_epoch(sizes: Mapping[Bucket, int], batch_size: Mapping[Bucket, int]) -> Fraction:
    """Steps that show every clip once; of each bucket its clips over its global batch."""
    return sum((Fraction(size, batch_size[b]) for b, size in sizes.items()), Fraction())


def num_steps(of_an_epoch: Fraction, *, num_epochs: float) -> int:
    """Optimizer steps that show every clip num_epochs times, rounded up."""
    return max(1, math.ceil(of_an_epoch * Fraction(num_epochs).limit_denominator(10**6)))
