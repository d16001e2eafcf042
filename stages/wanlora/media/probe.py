"""Decode a whole video once, check it, and measure it.

Owns: the time axis (0 is the presentation time of the first frame that the decoder returns), and
the definition of a broken file. Must not know: clips, manifests, captions.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from wanlora.core.out_of_memory import is_out_of_memory
from wanlora.errors import MediaError
from wanlora.media import colour, scenes
from wanlora.media.frames import (
    fraction,
    frame_ticks,
    open_video,
    pts_of,
    read_frames,
    require_intact,
    seconds,
    time_base,
)
from wanlora.media.orientation import orientation
from wanlora.media.source import reading
from wanlora.media.timeline import Timeline

HDR_TRANSFERS = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}
MIN_DECODED_SHARE = 0.95
"""Minimum decoded span over the header's duration. The rest of a truncated file decodes without
error."""

_CLOCK = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")
"""`00:00:02.400000000`."""


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """Content of a video's headers and first frame; sizes as displayed, after rotation.

    Attributes:
        rotation: Quarter turns counter-clockwise that make the coded frame upright.
        mirrored: True if left and right are swapped before the rotation.
        sample_aspect: Width over height of one displayed pixel.
        hdr: Name of the HDR transfer function, or None.
        matrix: Colour matrix that the file names, by FFmpeg's name, or `unspecified`.
        assumed_matrix: Matrix to decode with instead of FFmpeg's default; None to keep that.
        duration_s: Length of the video by the header, or None.
    """

    width: int
    height: int
    rotation: int
    mirrored: bool
    sample_aspect: Fraction
    codec: str
    hdr: str | None
    matrix: str
    assumed_matrix: str | None
    interlaced: bool
    duration_s: float | None


@dataclass(frozen=True, slots=True)
class Scan:
    """Measurements of a whole video.

    Attributes:
        span_s: Seconds from the first frame to the end of the last one.
        fps: Mean frames per second between the first and the last frame.
        timeline: Time of every frame.
        cuts_s: Times of the first frames of new scenes, from the first frame of the video.
    """

    info: VideoInfo
    num_frames: int
    span_s: float
    fps: float
    timeline: Timeline
    cuts_s: tuple[float, ...] = ()


def scan(
    path: Path,
    *,
    detector: scenes.Detector = "none",
    alive: Callable[[], None] = lambda: None,
) -> Scan:
    """Decode every frame once, and measure the video.

    Args:
        path: The video.
        detector: Detector of scene cuts.
        alive: Called after every frame.

    Raises:
        MediaError: As `open_video`; corrupt_at when a frame does not decode cleanly; truncated when
            the file ends before 95 % of the header's duration.
    """
    cuts = scenes.finder(detector)
    with reading(path), open_video(path) as (container, stream):
        times: list[int] = []
        first: VideoFrame | None = None
        last: VideoFrame | None = None
        interlaced = False
        for frame in _whole_frames(path, container, stream, alive):
            alive()
            if cuts is not None:
                cuts.add(frame)
            interlaced |= frame.interlaced_frame
            times.append(pts_of(frame))
            first, last = first or frame, frame
        if first is None or last is None:
            raise MediaError("unreadable", f"{path} has a video stream without a single frame")
        info = replace(_info(path, container, stream, first), interlaced=interlaced)
        unit = time_base(stream)
        ticks = times[-1] - times[0]
        end = ticks + frame_ticks(last, stream, fallback=ticks // max(1, len(times) - 1))
    span_s = float(end * unit)
    _require_whole(path, span_s, info.duration_s)
    return Scan(
        info,
        num_frames=len(times),
        span_s=span_s,
        fps=(len(times) - 1) / float(ticks * unit) if ticks else 0.0,
        timeline=Timeline.of(times, time_base=unit, last_ticks=max(1, end - ticks)),
        cuts_s=tuple(float((times[i] - times[0]) * unit) for i in cuts.found()) if cuts else (),
    )


def _whole_frames(
    path: Path, container: InputContainer, stream: VideoStream, alive: Callable[[], None]
) -> Iterator[VideoFrame]:
    """Yield every frame; refuse a damaged one, as truncated if the file ends there."""
    first: VideoFrame | None = None
    try:
        for frame in read_frames(path, container, stream):
            require_intact(path, stream, frame, since=first)
            first = first or frame
            yield frame
    except MediaError as damage:
        if damage.code == "corrupt_at":
            _require_packets_to_the_end(path, alive)
        raise


def _info(
    path: Path, container: InputContainer, stream: VideoStream, frame: VideoFrame
) -> VideoInfo:
    turns, mirrored = orientation(path, frame)
    aspect = fraction(stream.sample_aspect_ratio) or Fraction(1)
    height, width = frame.height, frame.width
    if turns % 2:
        aspect, height, width = 1 / aspect, width, height
    return VideoInfo(
        width=width,
        height=height,
        rotation=turns,
        mirrored=mirrored,
        sample_aspect=aspect,
        codec=stream.codec_context.name,
        hdr=HDR_TRANSFERS.get(stream.codec_context.color_trc),
        matrix=colour.matrix_name(frame),
        assumed_matrix=colour.assumed_matrix(frame),
        interlaced=frame.interlaced_frame,
        duration_s=_header_duration_s(container, stream, seconds(frame, stream)),
    )


def _header_duration_s(
    container: InputContainer, stream: VideoStream, first_s: float
) -> float | None:
    """Seconds from the first frame to the end of the video (not of its audio), by the header.

    Matroska's durations count from the file's zero, and a video that was cut without encoding it
    again starts later: `first_s`, the timestamp of its first frame.
    """
    if stream.duration:
        return float(stream.duration * time_base(stream))
    if tag := _CLOCK.fullmatch(stream.metadata.get("DURATION", "")):  # of Matroska
        hours, minutes, secs = tag.groups()
        return int(hours) * 3600 + int(minutes) * 60 + float(secs) - first_s
    if not container.duration:
        return None
    return (container.duration + (container.start_time or 0)) / av.time_base - first_s


def _require_packets_to_the_end(path: Path, alive: Callable[[], None]) -> None:
    """Refuse a file that was cut off inside a frame as truncated, not as damaged."""
    with open_video(path) as (container, stream):
        try:
            times = []
            for packet in container.demux(stream):
                alive()
                if packet.pts is not None:
                    times.append(packet.pts)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return
        if times:
            first_s = float(min(times) * time_base(stream))
            span_s = float(max(times) * time_base(stream)) - first_s
            _require_whole(path, span_s, _header_duration_s(container, stream, first_s))


def _require_whole(path: Path, span_s: float, expected_s: float | None) -> None:
    if expected_s and span_s < MIN_DECODED_SHARE * expected_s:
        raise MediaError(
            "truncated",
            f"{path}: the header gives a duration of {expected_s:.2f} s, but its frames end after "
            f"{span_s:.2f} s; copy or download it again",
        )
