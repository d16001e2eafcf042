"""Which clips make up the global batch of each step, as a function of (seed, step).

Owns: the order of training. A global batch holds one bucket. Each bucket has its own stream: its
epoch permutations end to end, cut into full global batches, the remainder running on into the next
epoch. Which bucket comes next is a draw in proportion to its number of clips.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from wanlora.core.buckets import Bucket
from wanlora.core.rng import Stream, generator

# Slot of the bucket draw; permutations use 1 + the bucket's rank, so the two never share a counter.
_BUCKET_SLOT = 0


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
    """

    def __init__(self, sizes: Mapping[Bucket, int], *, batch_size: int, seed: int) -> None:
        assert sizes, "no clips"
        assert min(sizes.values()) >= 1, sizes
        self._buckets = sorted(sizes)
        self._sizes = [sizes[bucket] for bucket in self._buckets]
        self._batch_size = batch_size
        self._seed = seed
        self._choices: list[tuple[int, int]] = []  # (bucket rank, batches of it before), by step
        self._taken = [0] * len(self._buckets)
        self._permutation = lru_cache(maxsize=2 * len(self._buckets))(self._draw_permutation)

    def batch(self, step: int) -> GlobalBatch:
        """Global batch of a step, counted from 0."""
        while len(self._choices) <= step:
            rank = self._draw_bucket(len(self._choices))
            self._choices.append((rank, self._taken[rank]))
            self._taken[rank] += 1
        rank, earlier = self._choices[step]
        size = self._sizes[rank]
        first = earlier * self._batch_size
        indices = tuple(
            int(self._permutation(rank, position // size)[position % size])
            for position in range(first, first + self._batch_size)
        )
        return GlobalBatch(self._buckets[rank], indices)

    def _draw_bucket(self, step: int) -> int:
        if len(self._buckets) == 1:
            return 0
        u = generator(self._seed, Stream.ORDER, step, _BUCKET_SLOT).random()
        edges = np.cumsum(self._sizes) / sum(self._sizes)
        return int(np.searchsorted(edges, u, side="right").clip(max=len(self._buckets) - 1))

    def _draw_permutation(
        self, rank: int, epoch: int
    ) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return generator(self._seed, Stream.ORDER, epoch, 1 + rank).permutation(self._sizes[rank])


def num_steps(num_clips: int, *, batch_size: int, num_epochs: float) -> int:
    """Optimizer steps that show every clip num_epochs times: ceil(num_epochs N / global batch)."""
    return max(1, math.ceil(num_epochs * num_clips / batch_size))
