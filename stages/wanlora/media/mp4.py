"""Frames to an mp4 that plays everywhere: H.264, yuv420p, BT.709, index first.

Owns: encoding of what people look at. Dimensions: t frames, h height, w width in px.
"""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from jaxtyping import UInt8

from wanlora.errors import MediaError
from wanlora.files import partial_path, publish

TAGS = frozenset({"title", "comment", "artist", "album", "date", "description", "copyright"})
"""Metadata that the mp4 muxer keeps; it drops any other name without a word."""

CRF = "16"
ENCODER_THREADS = 2
"""Fixed, because x264 writes their number into the file: equal frames give equal bytes."""


def write(
    path: Path,
    frames: UInt8[np.ndarray, "t h w 3"],
    *,
    fps: float,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a video; it appears under its name when it is complete.

    Args:
        path: Where; its folder is made.
        frames: RGB, even height and width.
        fps: Frames a second.
        metadata: `title`, `comment` and others of `TAGS`.

    Raises:
        MediaError: bad_size when height or width is odd, which yuv420p cannot hold.
    """
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise MediaError(
            "bad_size", f"{path}: frames are {width}x{height} px; expected an even width and height"
        )
    unknown = set(metadata or {}) - TAGS
    assert not unknown, f"an mp4 would lose the metadata {sorted(unknown)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_path(path)
    try:
        _encode(temporary, frames, fps, metadata or {})
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _encode(
    path: Path, frames: UInt8[np.ndarray, "t h w 3"], fps: float, metadata: Mapping[str, str]
) -> None:
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata.update(metadata)
        stream = container.add_stream(
            "libx264",
            rate=Fraction(fps).limit_denominator(1001),
            options={"crf": CRF, "preset": "medium"},
        )
        stream.height, stream.width = frames.shape[1:3]
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
            yuv = rgb.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            container.mux(stream.encode(yuv))
        container.mux(stream.encode())
