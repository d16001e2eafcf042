"""Frames of a video in presentation order, each with a reliable time.

Owns: opening a video, the time of a frame, and the definition of a damaged frame.
Must not know: which frames are used, clips, manifests.
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
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

DECODER_VERSION: str = av.__version__
"""Release of PyAV, and with it of FFmpeg: another one may decode a file differently."""


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and its best video stream; one thread decodes it.

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


def read_frames(path: Path, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Yield frames in presentation order from the container's position.

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
        _set_time(frame, last, timeless=container.format.name == "avi")
        _require_order(path, stream, frame, last)
        last = frame
        yield frame


def _set_time(frame: VideoFrame, last: VideoFrame | None, *, timeless: bool) -> None:
    """Set the time of a frame if its container has none.

    An AVI has no presentation times, and FFmpeg's guess is wrong with B-frames. But the
    index of a packet is its decoding time, and the decoder returns frames in presentation order, a
    constant delay later. It returns the last ones after the last packet, and for these an MPEG
    program stream repeats an old time.
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
    """Refuse a frame that the decoder repaired: FFmpeg conceals damage and only sets a flag."""
    if frame.is_corrupt:
        at = 0.0 if since is None else seconds(frame, stream) - seconds(since, stream)
        raise MediaError("corrupt_at", f"{path}: the frame at {at:.3f} s is damaged")


def pts_of(frame: VideoFrame) -> int:
    """Presentation time in ticks of the time base; `read_frames` checked that it is there."""
    assert frame.pts is not None
    return frame.pts


def time_base(stream: VideoStream) -> Fraction:
    """Seconds per tick."""
    unit = fraction(stream.time_base)
    assert unit is not None, "FFmpeg gives every stream it demuxes a time base"
    return unit


def fraction(rational: Any) -> Fraction | None:
    """Convert a rational number of PyAV; None when the file leaves it unset.

    From PyAV 19 on it is an `av.AVRational`, which does not mix with `Fraction` in every operation,
    and an unset one is 0 or n/0 instead of None. No other function reads such a number.
    """
    return Fraction(rational.numerator, rational.denominator) if rational else None


def seconds(frame: VideoFrame, stream: VideoStream) -> float:
    """Presentation time of a frame on the file's own clock."""
    return float(pts_of(frame) * time_base(stream))


def frame_ticks(frame: VideoFrame, stream: VideoStream, *, fallback: int) -> int:
    """Duration of a frame in ticks; if the file has none, the fallback, else by the mean rate."""
    rate = fraction(stream.average_rate)
    nominal = round(1 / (rate * time_base(stream))) if rate else 1
    return frame.duration or fallback or nominal


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
    """Advice for damage that a copy of the packets (`-c copy`) to a new file does not repair."""
    output = path.with_name(f"{path.stem}-encoded.mp4")
    return (
        f"encode it again: ffmpeg -i {shlex.quote(str(path))} -fps_mode cfr -c:v libx264 -crf 12 "
        f"-an {shlex.quote(str(output))}"
    )
