"""Open a video, walk its frames with every check, and say what it is.

Owns: the time axis (0 is the presentation time of the first frame the decoder gives), what counts
as a broken file, and the one way frames are read. Must not know: clips, manifests, captions.
"""

import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from wanlora.core.aspect import MAX_PICTURE_PX, size_problem
from wanlora.core.out_of_memory import is_out_of_memory
from wanlora.errors import MediaError
from wanlora.media import colour, scenes
from wanlora.media.orientation import orientation
from wanlora.media.source import reading
from wanlora.media.timeline import Timeline

HDR_TRANSFERS = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}
MIN_DECODED_SHARE = 0.95
"""Decoded span over the header's duration; a truncated file decodes what is left without error."""

_CLOCK = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")
"""`00:00:02.400000000`."""


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video's headers and first frame say; sizes as displayed, after rotation.

    Attributes:
        rotation: Quarter turns counter-clockwise that make the coded frame upright.
        mirrored: Whether left and right are swapped before it is turned.
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
    """What decoding every frame of a video shows.

    Attributes:
        span_s: From the first frame to the end of the last one.
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


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and its best video stream, to be decoded by one thread.

    Raises:
        MediaError: missing, unreadable, no_video, or bad_size for frames that are too large.
    """
    try:
        container = av.open(str(path))
    except FileNotFoundError:
        raise MediaError("missing", f"{path}: there is no such file") from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        size = path.stat().st_size if path.is_file() else 0
        raise MediaError(
            "unreadable", f"{path} ({size:,} bytes): FFmpeg cannot open it as a video: {error}"
        ) from None
    with container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise MediaError("no_video", f"{path} has no video stream")
        context = stream.codec_context
        if problem := size_problem(context.height, context.width):
            raise MediaError("bad_size", f"{path}: {problem}")
        context.options = {"max_pixels": str(MAX_PICTURE_PX)}  # a later frame may be larger
        context.thread_count = 1
        yield container, stream


def probe(path: Path) -> VideoInfo:
    """Read headers and the first frame.

    Raises:
        MediaError: As `open_video`, and unreadable or corrupt_at for the first frame.
    """
    with reading(path), open_video(path) as (container, stream):
        frame = first_frame(path, container, stream)
        return _info(path, container, stream, frame)


def scan(
    path: Path,
    *,
    detector: scenes.Detector = "none",
    alive: Callable[[], None] = lambda: None,
) -> Scan:
    """Decode every frame once, and measure.

    Args:
        path: The video.
        detector: What looks for scene cuts.
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
    """Yield every frame; one that is damaged is refused, as truncated when the file ends there."""
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


def read_frames(path: Path, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Yield frames in presentation order from where the container stands.

    Raises:
        MediaError: corrupt_at when decoding fails or time runs backwards; unreadable when frames
            have no timestamps or change their size.
    """
    last: VideoFrame | None = None
    frames = container.decode(stream)
    while True:
        try:
            frame = next(frames, None)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            at = 0.0 if last is None else seconds(last, stream)
            raise MediaError(
                "corrupt_at", f"{path}: decoding stops after timestamp {at:.3f} s: {error}"
            ) from None
        if frame is None:
            return
        _mend_time(frame, last, timeless=container.format.name == "avi")
        _require_order(path, stream, frame, last)
        last = frame
        yield frame


def _mend_time(frame: VideoFrame, last: VideoFrame | None, *, timeless: bool) -> None:
    """Give a frame the time that its container does not.

    An AVI has no presentation times, and FFmpeg's guess is wrong with B-frames. But a packet's
    place is its decoding time, and frames leave the decoder in the order in which they are shown, a
    constant delay later. The last ones come when no packet is left; then an MPEG program stream
    repeats an old time.
    """
    if timeless and frame.dts is not None:
        frame.pts = frame.dts
    elif frame.dts is None and last is not None:
        stale = frame.pts is None or frame.pts <= pts_of(last)
        if timeless or stale:
            frame.pts = pts_of(last) + max(1, frame.duration)


def first_frame(path: Path, container: InputContainer, stream: VideoStream) -> VideoFrame:
    """Decode the first frame, whose timestamp is the start of the time axis."""
    for frame in read_frames(path, container, stream):
        return frame
    raise MediaError("unreadable", f"{path} has a video stream without a single frame")


def require_intact(
    path: Path, stream: VideoStream, frame: VideoFrame, *, since: VideoFrame | None
) -> None:
    """Refuse a frame that the decoder patched up: FFmpeg conceals bit rot and only flags it."""
    if frame.is_corrupt:
        at = 0.0 if since is None else seconds(frame, stream) - seconds(since, stream)
        raise MediaError("corrupt_at", f"{path}: the frame at {at:.3f} s is damaged")


def pts_of(frame: VideoFrame) -> int:
    """Presentation time in ticks of the time base; `read_frames` checked that it is there."""
    assert frame.pts is not None
    return frame.pts


def time_base(stream: VideoStream) -> Fraction:
    """Seconds per tick."""
    unit = _fraction(stream.time_base)
    assert unit is not None, "FFmpeg gives every stream it demuxes a time base"
    return unit


def _fraction(rational: Any) -> Fraction | None:
    """Convert a rational number of PyAV; None when the file leaves it unset.

    From PyAV 19 on it is an `av.AVRational`, which does not mix with `Fraction` in every operation,
    and an unset one is 0 or n/0 instead of None. No other function reads such a number.
    """
    return Fraction(rational.numerator, rational.denominator) if rational else None


def seconds(frame: VideoFrame, stream: VideoStream) -> float:
    """Presentation time of a frame on the file's own clock."""
    return float(pts_of(frame) * time_base(stream))


def frame_ticks(frame: VideoFrame, stream: VideoStream, *, fallback: int) -> int:
    """How long a frame is shown; files that do not say give the fallback, else the mean rate."""
    rate = _fraction(stream.average_rate)
    nominal = round(1 / (rate * time_base(stream))) if rate else 1
    return frame.duration or fallback or nominal


def _info(
    path: Path, container: InputContainer, stream: VideoStream, frame: VideoFrame
) -> VideoInfo:
    turns, mirrored = orientation(path, frame)
    aspect = _fraction(stream.sample_aspect_ratio) or Fraction(1)
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
    """Seconds from the first frame to the end of the video, not of its sound, by the header.

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


def _require_order(
    path: Path, stream: VideoStream, frame: VideoFrame, last: VideoFrame | None
) -> None:
    if frame.pts is None:
        raise MediaError("unreadable", f"{path}: frames have no timestamps; {_encode_again(path)}")
    if last is None:
        return
    if frame.pts < pts_of(last):
        raise MediaError(
            "corrupt_at",
            f"{path}: time runs backwards from {seconds(last, stream):.3f} s to "
            f"{seconds(frame, stream):.3f} s; {_encode_again(path)}",
        )
    if (frame.width, frame.height) != (last.width, last.height):
        raise MediaError(
            "unreadable",
            f"{path}: frames change from {last.width}x{last.height} to "
            f"{frame.width}x{frame.height} at {seconds(frame, stream):.3f} s; cut it in "
            f"two, or {_encode_again(path)}",
        )


def _encode_again(path: Path) -> str:
    """Advice for what a copy of the packets (`-c copy`) into another file does not repair."""
    output = path.with_name(f"{path.stem}-encoded.mp4")
    return (
        f"encode it again: ffmpeg -i {shlex.quote(str(path))} -fps_mode cfr -c:v libx264 -crf 12 "
        f"-an {shlex.quote(str(output))}"
    )


def _require_packets_to_the_end(path: Path, alive: Callable[[], None]) -> None:
    """Tell a file that was cut off, inside a frame, from one that is damaged inside."""
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
            f"{path}: the header promises {expected_s:.2f} s, but its frames end after "
            f"{span_s:.2f} s; copy or download it again",
        )
