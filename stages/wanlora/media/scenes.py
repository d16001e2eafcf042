"""Scene cuts, found on the frames that the scan decodes anyway.

Owns: two detectors. `builtin` finds only near-certain hard cuts: it compares thumbnails of
neighbouring frames. `pyscenedetect` is PySceneDetect's adaptive detector, an optional
extra. Neither finds fades. Dimensions: h height, w width in px.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation

from wanlora.errors import ConfigError

Detector = Literal["builtin", "pyscenedetect", "none"]

THUMBNAIL = (32, 18)
"""Width and height: small enough that noise and small movements vanish."""

MIN_DIFFERENCE = 20.0
"""Mean absolute difference of 8-bit RGB thumbnails across a near-certain cut."""

MIN_RATIO = 5.0
"""Minimum ratio of a cut's difference to the largest difference among its neighbours."""

NEIGHBOURS = 6
"""Frames on each side that a cut is compared with."""


@runtime_checkable
class Finder(Protocol):
    """Takes every frame in order, then returns those that start a new scene."""

    def add(self, frame: VideoFrame) -> None:
        """Process the next frame."""

    def found(self) -> list[int]:
        """Indices of the frames that start a scene, without the first scene."""


def finder(detector: Detector) -> Finder | None:
    """Make a finder; None if the detector is `none`.

    Raises:
        ConfigError: PySceneDetect is selected and not installed, or cannot start.
    """
    if detector == "none":
        return None
    return _Builtin() if detector == "builtin" else _PySceneDetect()


class _Builtin:
    """Differences over one frame and over two; over two, a flash has none and a cut has one."""

    def __init__(self) -> None:
        self._recent: deque[np.ndarray] = deque(maxlen=3)
        self._steps: list[float] = []
        self._jumps: list[float] = []

    def add(self, frame: VideoFrame) -> None:
        width, height = THUMBNAIL
        thumbnail = frame.to_ndarray(
            format="rgb24", width=width, height=height, interpolation=Interpolation.AREA, threads=1
        ).astype(np.int16)
        self._recent.append(thumbnail)
        if len(self._recent) > 1:
            self._steps.append(_distance(self._recent[-2], thumbnail))
        if len(self._recent) > 2:
            self._jumps.append(_distance(self._recent[-3], thumbnail))

    def found(self) -> list[int]:
        return near_certain(self._steps, self._jumps)


def near_certain(steps: Sequence[float], jumps: Sequence[float]) -> list[int]:
    """Find cuts in the differences of thumbnails.

    Args:
        steps: Difference of frames i and i+1.
        jumps: Difference of frames i and i+2.
    """
    cuts = []
    for i, step in enumerate(steps):
        if step < MIN_DIFFERENCE:
            continue
        around = [*steps[max(0, i - NEIGHBOURS) : i], *steps[i + 1 : i + 1 + NEIGHBOURS]]
        stays = i >= len(jumps) or jumps[i] >= 0.7 * step
        came = i == 0 or jumps[i - 1] >= 0.7 * step
        if stays and came and step >= MIN_RATIO * max(around, default=0.0):
            cuts.append(i + 1)
    return cuts


class _PySceneDetect:
    """PySceneDetect's adaptive detector at its own defaults, on frames 256 px wide."""

    def __init__(self) -> None:
        try:
            from scenedetect import FrameTimecode  # noqa: PLC0415  optional, and slow to import
            from scenedetect.detectors import AdaptiveDetector  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError(
                f"PySceneDetect cannot be used ({error}); install it with: "
                "pip install 'wanlora[scenes]', or choose --scenes builtin"
            ) from None
        self._detector: Any = AdaptiveDetector()
        self._timecode: Any = FrameTimecode
        self._cuts: list[Any] = []
        self._count = 0

    def add(self, frame: VideoFrame) -> None:
        height = max(2, round(256 * frame.height / frame.width))
        pixels = frame.to_ndarray(
            format="bgr24", width=256, height=height, interpolation=Interpolation.AREA, threads=1
        )
        # Counted, not timed: a rate of one makes its timecodes the indices of frames.
        self._cuts += self._detector.process_frame(self._timecode(self._count, 1.0), pixels)
        self._count += 1

    def found(self) -> list[int]:
        cuts = [*self._cuts, *self._detector.post_process(self._timecode(self._count, 1.0))]
        return sorted({cut.frame_num for cut in cuts} - {0})


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())
