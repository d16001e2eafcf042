"""Decode a cut of a video to upright RGB frames at a given rate.

Owns: the choice of frames. Output k is the frame on screen at start + k/fps, the last one with
pts <= that time; frames are repeated or left out, never blended, and time is never warped.
Dimensions: t frames, h height, w width in px.
"""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from jaxtyping import UInt8

from wanlora.errors import MediaError
from wanlora.media import colour
from wanlora.media.frames import (
    first_frame,
    frame_ticks,
    open_video,
    pts_of,
    read_frames,
    require_intact,
    time_base,
)
from wanlora.media.orientation import orientation
from wanlora.media.source import reading
from wanlora.media.timeline import target_ticks

SEEK_BACK_S = (0.0, 2.0, 10.0)

UNSEEKABLE_FORMATS = frozenset({"mpeg"})
"""Formats that are read from the start. Few frames of an MPEG program stream have timestamps, and
after a seek FFmpeg's guesses for the others are wrong by up to three frames."""


def decode(
    path: Path,
    *,
    start_s: float,
    fps: float,
    num_frames: int,
    matrix: str | None = None,
    coarse: bool = False,
) -> UInt8[np.ndarray, "t h w 3"]:
    """Decode a cut into one array, rotated upright; pixels keep the file's size and aspect.

    Args:
        path: The video.
        start_s: Seconds after the first frame of the video.
        fps: Frames per second of the output.
        num_frames: Frames of the output.
        matrix: One of `colour.ASSUMABLE`, for a file that names no colour matrix.
        coarse: True if timestamps are rounded to 10 ms (`Timeline.coarse`).

    Raises:
        MediaError: The file cannot be read, a frame of the cut is damaged (corrupt_at), or the
            video ends before the cut does (too_short).
    """
    frames = iter_frames(
        path, start_s=start_s, fps=fps, num_frames=num_frames, matrix=matrix, coarse=coarse
    )
    return np.stack(list(frames))


def iter_frames(
    path: Path,
    *,
    start_s: float,
    fps: float,
    num_frames: int,
    matrix: str | None = None,
    coarse: bool = False,
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Decode like `decode`, but yield one frame at a time; a whole 4K cut would need gigabytes."""
    assert start_s >= 0
    assert num_frames >= 1
    with reading(path), open_video(path) as (container, stream):
        first = first_frame(path, container, stream)
        unit = time_base(stream)
        targets = target_ticks(unit, start_s=start_s, fps=fps, num_frames=num_frames, coarse=coarse)
        targets = [pts_of(first) + ticks for ticks in targets]
        picked: VideoFrame | None = None
        picture: UInt8[np.ndarray, "h w 3"] | None = None
        for frame in _pick(path, container, stream, first, targets, int(1 / fps / unit)):
            if picture is None or frame is not picked:
                require_intact(path, stream, frame, since=first)
                picked, picture = frame, _upright(path, frame, matrix)
            yield picture


def _pick(
    path: Path,
    container: InputContainer,
    stream: VideoStream,
    first: VideoFrame,
    targets: list[int],
    period: int,
) -> Iterator[VideoFrame]:
    """Yield, for every target, the last frame with pts <= target.

    The last frame of the video lasts at least `period` ticks, the time of one output frame, because
    its duration in the file is often wrong.
    """
    done = 0
    shown: VideoFrame | None = None
    previous: VideoFrame | None = None
    for frame in _frames_from(path, container, stream, first, targets[0]):
        while shown is not None and pts_of(frame) > targets[done]:
            yield shown
            done += 1
            if done == len(targets):
                return
        previous, shown = shown, frame
    assert shown is not None
    gap = pts_of(shown) - pts_of(previous) if previous is not None else 0
    held = frame_ticks(shown, stream, fallback=gap)
    end = pts_of(shown) + held
    while done < len(targets) and targets[done] < pts_of(shown) + max(held, period):
        yield shown
        done += 1
    if done < len(targets):
        unit = float(time_base(stream))
        begin = pts_of(first)
        raise MediaError(
            "too_short",
            f"{path}: the cut ends at {(targets[-1] - begin) * unit:.3f} s, the video at "
            f"{(end - begin) * unit:.3f} s; has it changed? Run wanlora prepare again",
        )


def _frames_from(
    path: Path,
    container: InputContainer,
    stream: VideoStream,
    first: VideoFrame,
    target: int,
) -> Iterator[VideoFrame]:
    """Yield frames from one with pts <= target on, seeking as near to the target as possible.

    A seek uses decoding times or a sparse index. It may land too late, or between two key frames,
    and then the frames that others refer to are missing. In both cases seek further back, and
    finally read from the start.
    """
    seekable = container.format.name not in UNSEEKABLE_FORMATS
    for back_s in SEEK_BACK_S if seekable else ():
        ticks = target - int(Fraction(back_s) / time_base(stream))
        if ticks <= pts_of(first):
            break
        container.seek(ticks, stream=stream, backward=True)
        frames = read_frames(path, container, stream)
        frame = _first_key_frame(frames)
        if frame is not None and pts_of(frame) <= target:
            yield frame
            yield from frames
            return
    with open_video(path) as (fresh, fresh_stream):
        yield from read_frames(path, fresh, fresh_stream)


def _first_key_frame(frames: Iterator[VideoFrame]) -> VideoFrame | None:
    """Skip to the first key frame; None if there is none or it cannot be read."""
    try:
        return next((frame for frame in frames if frame.key_frame), None)
    except MediaError:  # reading from further back may succeed, or raises the final error
        return None


def _upright(path: Path, frame: VideoFrame, matrix: str | None) -> UInt8[np.ndarray, "h w 3"]:
    turns, mirrored = orientation(path, frame)
    source = colour.source_matrix(frame, matrix)
    pixels = frame.to_ndarray(format="rgb24", src_colorspace=source, threads=1)
    return np.ascontiguousarray(np.rot90(pixels[:, ::-1] if mirrored else pixels, k=turns))
