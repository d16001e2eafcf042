"""Presentation times of a video's frames, and the frames that a clip at another rate takes.

Owns: the tolerance for rounded timestamps, the number of frames that fit between scene cuts, and
the count of repeated frames. Pure functions. Must not know: FFmpeg, clips, manifests.
Dimensions: n frames of the video, t frames of a clip. A tick is the unit of the file's timestamps.
"""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

MAX_ROUNDING_S = Fraction(1, 2000)
"""Matroska, WebM and FLV round timestamps to 1 ms, so a timestamp is up to half of that late."""

MAX_COARSE_ROUNDING_S = Fraction(1, 200)
"""A GIF rounds timestamps to 10 ms."""

COARSE = "rounded to 10 ms"
"""Name in a clip's transform for timestamps that `Timeline.coarse` finds."""


class Part(NamedTuple):
    """A part of a video without a scene cut, and the number of clip frames it holds."""

    start_s: float
    available: int


class Repeats(NamedTuple):
    """Frames of a clip that show the same frame of the video as the one before.

    Attributes:
        repeated: Number of such frames.
        longest: Maximum number of frames of the clip that show the same frame of the video.
    """

    repeated: int
    longest: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """Times of the frames of a video; small enough to keep for every video of a data set.

    Attributes:
        time_base: Seconds per tick.
        gaps: Ticks between neighbouring frames: int64, little endian, zlib, base64.
        last_ticks: Duration of the last frame by the file, in ticks; wrong in some files.
    """

    time_base: Fraction
    gaps: str
    last_ticks: int

    @classmethod
    def of(cls, ticks: Sequence[int], *, time_base: Fraction, last_ticks: int) -> "Timeline":
        """Pack presentation times in ticks, in order."""
        gaps = np.diff(np.asarray(ticks, np.int64)).astype("<i8")
        packed = base64.b64encode(zlib.compress(gaps.tobytes())).decode()
        return cls(time_base, packed, last_ticks)

    def ticks(self) -> Int64[np.ndarray, "n"]:
        """Presentation times in ticks after the first frame."""
        gaps = np.frombuffer(zlib.decompress(base64.b64decode(self.gaps)), "<i8")
        return np.concatenate([[0], gaps.cumsum()]).astype(np.int64)

    @property
    def rounded(self) -> bool:
        """True if timestamps are rounded to ticks: then some gaps differ by exactly one tick."""
        return bool((np.diff(np.unique(np.diff(self.ticks()))) == 1).any())

    @property
    def coarse(self) -> bool:
        """True if timestamps are rounded to more than 1 ms and at most 10 ms, as in a GIF."""
        in_range = MAX_ROUNDING_S < self.time_base / 2 <= MAX_COARSE_ROUNDING_S
        return in_range and self.rounded

    def parts(self, cuts_s: Sequence[float], fps: float) -> list[Part]:
        """Split the video at its scene cuts and count the frames at `fps` in each part.

        A part holds the frames that are due by the time of its last frame, even if the file gives
        that frame a shorter duration, and those whose whole period fits. Both allow for rounded
        timestamps: up to half a tick at either end.

        Args:
            cuts_s: Times of the first frames of new scenes, after the first frame of the video.
            fps: Frames per second of a clip.
        """
        ticks, unit, rate = self.ticks(), self.time_base, _rate(fps)
        tolerance = 2 * rounding_s(unit, coarse=self.coarse)
        starts = [0, *(round(Fraction(at) / unit) for at in cuts_s)]
        found = []
        for start, end in pairwise([*starts, int(ticks[-1]) + self.last_ticks]):
            last = int(ticks[ticks < end][-1])
            due = 1 + int(((last - start) * unit + tolerance) * rate)
            whole = int(((end - start) * unit + tolerance) * rate)
            found.append(Part(self._start_s(start), max(due, whole)))
        return found

    def _start_s(self, start: int) -> float:
        """Time of the cut. A rounded one moves by half a tick, so that no later frame is early."""
        late = rounding_s(self.time_base, coarse=self.coarse) if start and self.rounded else 0
        return float(start * self.time_base + late)

    def shown(self, *, start_s: float, fps: float, num_frames: int) -> Int64[np.ndarray, "t"]:
        """Index of the video's frame that each frame of a clip shows."""
        targets = target_ticks(
            self.time_base, start_s=start_s, fps=fps, num_frames=num_frames, coarse=self.coarse
        )
        return np.searchsorted(self.ticks(), targets, side="right").astype(np.int64) - 1


def count_repeats(shown: Int64[np.ndarray, "t"]) -> Repeats:
    """Count repeated frames in what `Timeline.shown` returns."""
    lengths = np.unique(shown, return_counts=True)[1]
    return Repeats(repeated=len(shown) - len(lengths), longest=int(lengths.max()))


def target_ticks(
    time_base: Fraction, *, start_s: float, fps: float, num_frames: int, coarse: bool = False
) -> list[int]:
    """Times of a clip's frames in ticks after the first frame of the video, rounded down.

    A timestamp is the true time rounded to the time base, so one that is late by up to
    `rounding_s` still counts as on time.
    """
    start, rate = Fraction(start_s) + rounding_s(time_base, coarse=coarse), _rate(fps)
    return [int((start + k / rate) // time_base) for k in range(num_frames)]


def rounding_s(time_base: Fraction, *, coarse: bool) -> Fraction:
    """Largest error of a rounded timestamp: half a tick, at most 0.5 ms, or 5 ms if coarse."""
    return min(time_base / 2, MAX_COARSE_ROUNDING_S if coarse else MAX_ROUNDING_S)


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)  # 23.976023976 is 24000/1001
