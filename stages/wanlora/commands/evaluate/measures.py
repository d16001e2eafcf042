"""Measures of the videos: means by activity, and differences from the base's videos.

Owns: the list of measures. Their formulas are in `media.quality`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from wanlora.commands.evaluate.video_plan import Model, Video
from wanlora.core.intervals import mean_interval
from wanlora.errors import MediaError, RunError
from wanlora.media import quality, recorded
from wanlora.media.decode import decode

MEASURES: dict[str, Callable[[Any], float]] = {
    "motion": quality.motion,
    "consistency": quality.consistency,
    "sharpness": quality.sharpness,
}


def measure(frames: UInt8[np.ndarray, "t h w 3"]) -> dict[str, float]:
    """Measure a video before it is compressed; the values are kept in its record."""
    brightness = quality.luma(frames)
    return {name: of(brightness) for name, of in MEASURES.items()}


def frames_of(video: Video) -> UInt8[np.ndarray, "t h w 3"]:
    """Read the pixels of a video from its file.

    Raises:
        RunError: The file is damaged.
    """
    num_frames, _, _ = video.facts["size"]
    try:
        return decode(video.path, start_s=0, fps=video.facts["fps"], num_frames=num_frames)
    except MediaError as error:
        raise RunError(
            f"{video.path} is not the video that was written ({error.code}): delete it, and "
            "run the same command again"
        ) from error


def measured(model: Model) -> dict[str, Any]:
    """Average the measures by activity, and add the diversity of the activity's videos."""
    by_activity: dict[str, dict[Path, Video]] = {}
    for video in model.videos:
        by_activity.setdefault(video.activity, {})[video.path] = video
    return {activity: _of_activity(list(videos.values())) for activity, videos in
            by_activity.items()}  # fmt: skip


def _of_activity(videos: Sequence[Video]) -> dict[str, float | None]:
    means: dict[str, float | None] = {
        name: float(np.mean([_measures(video)[name] for video in videos])) for name in MEASURES
    }
    small = [quality.shrink(quality.luma(frames_of(video))) for video in videos]
    return means | {"diversity": quality.diversity(small)}


def against_base(model: Model, base: Model) -> dict[str, Any]:
    """Average the differences from the base's video of the same prompt and noise, by measure.

    Videos of one prompt are not independent: each prompt counts as one group of the interval.
    """
    pairs = list(zip(model.videos, base.videos, strict=True))
    prompts = [video.prompt_key for video in model.videos]
    result = {}
    for name in MEASURES:
        values = np.array([_measures(own)[name] - _measures(other)[name] for own, other in pairs])
        found = mean_interval(values, prompts)
        result[name] = {
            "paired_difference": found.mean,
            "ci95": list(found.ci95) if found.ci95 else None,
            "videos": len(values),
            "prompts": found.num_groups,
        }
    return result


def _measures(video: Video) -> dict[str, float]:
    record = recorded.read_record(video.path)
    assert record, video.path
    measures: dict[str, float] = record["measures"]
    return measures
