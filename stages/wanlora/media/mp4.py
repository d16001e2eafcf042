"""Encode frames for most players: H.264 in mp4, or VP9 in WebM; yuv420p, BT.709.

Owns: encoding of output videos. Dimensions: t frames, h height, w width in px.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from jaxtyping import UInt8

from wanlora.errors import MediaError
from wanlora.files import partial_path, publish, writing

TAGS = frozenset({"title", "comment", "artist", "album", "date", "description", "copyright"})
"""Metadata that the mp4 muxer keeps; it silently drops other names."""

ENCODER_THREADS = 2
"""Number of threads, fixed because x264 writes it into the file. Equal frames may still give other
bytes on a CPU with AVX-512: x264's macroblock tree varies there. Files without it are up to 46 %
larger."""


@dataclass(frozen=True, slots=True)
class Codec:
    """A container, its encoder, and the encoder's options."""

    container: str
    encoder: str
    options: Mapping[str, str]


H264 = Codec("mp4", "libx264", {"crf": "16", "preset": "medium"})
SMALL_H264 = Codec("mp4", "libx264", {"crf": "26", "preset": "slow"})
VP9 = Codec("webm", "libvpx-vp9", {"crf": "24", "b": "0", "cpu-used": "4", "row-mt": "1"})


def write(
    path: Path,
    frames: UInt8[np.ndarray, "t h w 3"],
    *,
    fps: float,
    metadata: Mapping[str, str] | None = None,
    codec: Codec = H264,
) -> None:
    """Write a video; it appears under its name when it is complete.

    Args:
        path: Path of the video; its folder is made.
        frames: RGB frames with even height and width.
        fps: Frames per second.
        metadata: `title`, `comment` and others of `TAGS`.
        codec: Codec and its settings.

    Raises:
        MediaError: bad_size when height or width is odd, which yuv420p cannot hold.
        OutputError: The file cannot be written.
    """
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise MediaError(
            "bad_size", f"{path}: frames are {width}x{height} px; expected an even width and height"
        )
    unknown = set(metadata or {}) - TAGS
    assert not unknown, f"an mp4 would lose the metadata {sorted(unknown)}"
    temporary = partial_path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _encode(str(temporary), frames, fps, metadata or {}, codec)
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def small(frames: UInt8[np.ndarray, "t h w 3"], *, fps: float, height: int) -> bytes:
    """Encode an mp4 for a page: at most `height` px high, and more compressed."""
    buffer = io.BytesIO()
    _encode(buffer, frames, fps, {}, SMALL_H264, most_height=height)
    return buffer.getvalue()


def _encode(
    target: str | io.BytesIO,
    frames: UInt8[np.ndarray, "t h w 3"],
    fps: float,
    metadata: Mapping[str, str],
    codec: Codec,
    *,
    most_height: int | None = None,
) -> None:
    height, width = frames.shape[1:3]
    if most_height is not None and height > most_height:
        height, width = _even(most_height), _even(width * most_height / height)
    # The index first, so that a player need not read to the end; it moves within a file only.
    indexed = isinstance(target, str) and codec.container == "mp4"
    options = {"movflags": "+faststart"} if indexed else {}
    with av.open(target, "w", format=codec.container, options=options) as container:
        container.metadata.update(metadata)
        stream: Any = container.add_stream(
            codec.encoder,
            rate=Fraction(fps).limit_denominator(1001),
            options=dict(codec.options),
        )
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.thread_count = ENCODER_THREADS
        # Untagged video is shown with a matrix that depends on the player and on the height.
        context.colorspace = Colorspace.ITU709
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        context.color_range = ColorRange.MPEG
        for pixels in frames:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            yuv = rgb.reformat(
                width=width, height=height, format="yuv420p", dst_colorspace=Colorspace.ITU709
            )
            container.mux(stream.encode(yuv))
        container.mux(stream.encode())


def _even(length: float) -> int:
    return max(2, 2 * round(length / 2))
