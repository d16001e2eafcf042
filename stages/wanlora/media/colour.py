"""Colour matrix from YUV to RGB of a video, for files that do not name one.

Owns: the rule for such files. FFmpeg uses BT.601 for all of them. Players choose by the size, and
wanlora does the same: BT.709 for HD (`core.aspect.is_hd`), BT.601 below. The range needs no rule:
FFmpeg and players use limited range unless the file or the pixel format (yuvj420p) has full range.
"""

from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace

from wanlora.core.aspect import is_hd

UNSPECIFIED = 2
NAMES = {
    0: "rgb", 1: "bt709", 4: "fcc", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 8: "ycgco",
    9: "bt2020nc", 10: "bt2020c", 14: "ictcp",
}  # fmt: skip
"""AVColorSpace of FFmpeg (libavutil/pixfmt.h)."""

ASSUMABLE = {"bt709": Colorspace.ITU709}


def matrix_name(frame: VideoFrame) -> str:
    """Name of the matrix that a file gives, `unspecified` if it gives none."""
    return NAMES.get(int(frame.colorspace), "unspecified")


def assumed_matrix(frame: VideoFrame) -> str | None:
    """Matrix to convert a frame with instead of FFmpeg's default; None to keep that.

    The size is the coded one, before rotation.
    """
    if int(frame.colorspace) != UNSPECIFIED or not _has_chroma(frame.format):
        return None
    return "bt709" if is_hd(frame.height, frame.width) else None


def source_matrix(frame: VideoFrame, assumed: str | None) -> Colorspace | None:
    """Argument for PyAV's conversion: the assumed matrix if the frame names none."""
    if assumed is None or int(frame.colorspace) != UNSPECIFIED:
        return None
    return ASSUMABLE[assumed]


def _has_chroma(format_: VideoFormat) -> bool:
    """Return whether a pixel format is YUV with colour; RGB, palettes and grey need no matrix."""
    return not (format_.is_rgb or format_.has_palette) and len(format_.components) >= 3
