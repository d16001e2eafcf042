"""Statistics of latents: training expects mean 0 and spread 1 in every channel, and no outliers.

Owns: sums over clips, and the clips that are outliers. Legend: C channels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Float64

from wanlora.core.spacing import evenly_spaced

T = TypeVar("T", int, str)

MIN_CLIPS = 8
"""Minimum number of clips for outliers: with fewer clips, the usual values are not known."""

FAR = 6.0
"""Distance of an outlier from the median, in robust standard deviations."""

LEAST_SPREAD = 0.01
"""Minimum standard deviation for distances: clips that differ by less than 1 % are equal."""


@dataclass(frozen=True, slots=True)
class ClipStatistics:
    """One clip's latents in four numbers."""

    key: str
    mean: float
    std: float
    least: float
    greatest: float


class BucketStatistics:
    """Sums over the clips of one bucket; clips may have any number of frames."""

    def __init__(self) -> None:
        self.clips: list[ClipStatistics] = []
        self._sum: Float64[np.ndarray, " c"] | None = None
        self._squares: Float64[np.ndarray, " c"] | None = None
        self._count = 0

    def add(self, key: str, latents: Float[np.ndarray, "c f h w"]) -> None:
        """Add a clip."""
        values = latents.reshape(len(latents), -1).astype(np.float64)
        sums, squares = values.sum(axis=1), np.square(values).sum(axis=1)
        self._sum = sums if self._sum is None else self._sum + sums
        self._squares = squares if self._squares is None else self._squares + squares
        self._count += values.shape[1]
        self.clips.append(
            ClipStatistics(
                key,
                float(values.mean()),
                float(values.std()),
                float(values.min()),
                float(values.max()),
            )
        )

    def channels(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over all clips; expected 0 and 1."""
        if self._sum is None or self._squares is None:
            return [], []
        mean = self._sum / self._count
        std = np.sqrt(np.maximum(self._squares / self._count - mean**2, 0))
        return mean.tolist(), std.tolist()

    def outliers(self) -> dict[str, str]:
        """Keys of the outliers, with the values that differ."""
        found: dict[str, str] = {}
        for name in ("mean", "std"):
            values = [getattr(clip, name) for clip in self.clips]
            for clip, distance in zip(self.clips, distances(values), strict=True):
                if abs(distance) > FAR:
                    text = f"{name} {getattr(clip, name):+.2f} ({distance:+.0f} deviations)"
                    found[clip.key] = f"{found[clip.key]}, {text}" if clip.key in found else text
        return found

    def summary(self, names: "dict[str, str]") -> dict[str, Any]:
        """Return the values for the table and the JSON.

        Args:
            names: Clip id by key.
        """
        mean, std = self.channels()
        return {
            "clips": len(self.clips),
            "channel_mean": [round(value, 4) for value in mean],
            "channel_std": [round(value, 4) for value in std],
            "outliers": [f"{names.get(key, key)}: {text}" for key, text in self.outliers().items()],
        }


def distances(values: Sequence[float]) -> list[float]:
    """Distance of each value from the median, in robust standard deviations (1.4826 MAD)."""
    if len(values) < MIN_CLIPS:
        return [0.0] * len(values)
    array = np.asarray(values, np.float64)
    median = np.median(array)
    spread = max(1.4826 * float(np.median(np.abs(array - median))), LEAST_SPREAD)
    apart: list[float] = ((array - median) / spread).tolist()
    return apart


def evenly(items: Iterable[T], number: int) -> list[T]:
    """At most `number` items, evenly spaced in their order."""
    everything = sorted(items)
    return [everything[place] for place in evenly_spaced(len(everything), number)]
