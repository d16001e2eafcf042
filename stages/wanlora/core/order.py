"""Which clips make up the global batch of each step, as a function of (seed, step).

Owns: the order of training. A global batch holds one bucket. Each bucket has its own stream: its
epoch permutations end to end, cut into full global batches, the remainder running on into the next
epoch. Which bucket comes next is a draw in proportion to its number of clips. Balanced, a stream is
made of rounds instead: every activity once a round, each activity's clips in its own permutations.
"""

import math
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from wanlora.core.buckets import Bucket
from wanlora.core.rng import Stream, generator

# Slot of the bucket draw; permutations use 1 + the bucket's rank, so the two never share a counter.
_BUCKET_SLOT = 0
_ROUND = 2**31 - 1  # group number of the order of activities within a round


class GlobalBatch(NamedTuple):
    """One optimizer step's clips: indices into the bucket's own list, in slot order."""

    bucket: Bucket
    indices: tuple[int, ...]


class Order:
    """The order of a run. Holds only a memo of the bucket draws; asking twice gives the same.

    Args:
        sizes: Number of clips of each bucket; the mapping's own order does not matter.
        batch_size: Clips in a global batch.
        seed: The run's seed.
        activities: Activity of each clip of each bucket, to balance them; None = every clip once
            an epoch.
    """

    def __init__(
        self,
        sizes: Mapping[Bucket, int],
        *,
        batch_size: int,
        seed: int,
        activities: Mapping[Bucket, Sequence[str]] | None = None,
    ) -> None:
        assert sizes, "no clips"
        assert min(sizes.values()) >= 1, sizes
        self._buckets = sorted(sizes)
        self._sizes = [sizes[bucket] for bucket in self._buckets]
        self._batch_size = batch_size
        self._seed = seed
        self._choices: list[tuple[int, int]] = []  # (bucket rank, batches of it before), by step
        self._taken = [0] * len(self._buckets)
        self._drawing = threading.Lock()  # several threads read ahead
        self._groups = [
            _members(activities[bucket]) if activities else [list(range(sizes[bucket]))]
            for bucket in self._buckets
        ]
        num_groups = sum(len(groups) for groups in self._groups)
        self._permutation = lru_cache(maxsize=4 * num_groups + 4)(self._draw_permutation)

    def batch(self, step: int) -> GlobalBatch:
        """Global batch of a step, counted from 0."""
        with self._drawing:
            while len(self._choices) <= step:
                rank = self._draw_bucket(len(self._choices))
                self._choices.append((rank, self._taken[rank]))
                self._taken[rank] += 1
        rank, earlier = self._choices[step]
        first = earlier * self._batch_size
        indices = tuple(
            self._clip(rank, position) for position in range(first, first + self._batch_size)
        )
        return GlobalBatch(self._buckets[rank], indices)

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

    def _draw_bucket(self, step: int) -> int:
        if len(self._buckets) == 1:
            return 0
        u = generator(self._seed, Stream.ORDER, step, _BUCKET_SLOT).random()
        edges = np.cumsum(self._sizes) / sum(self._sizes)
        return int(np.searchsorted(edges, u, side="right").clip(max=len(self._buckets) - 1))

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


def num_steps(num_clips: int, *, batch_size: int, num_epochs: float) -> int:
    """Optimizer steps that show every clip num_epochs times: ceil(num_epochs N / global batch)."""
    return max(1, math.ceil(num_epochs * num_clips / batch_size))
