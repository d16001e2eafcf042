"""Orientation of a frame: the display matrix of its file.

Owns: the meaning of that matrix, including mirroring.
"""

import struct
from pathlib import Path
from typing import Any

from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame

from wanlora.errors import MediaError


def orientation(path: Path, frame: VideoFrame) -> tuple[int, bool]:
    """Find the operations that make a frame upright: mirror, then turn counter-clockwise.

    A display matrix (a b; c d) maps coded (x, y) to (ax + cy, bx + dy). A clockwise turn by t has
    c = -sin t, d = cos t, and a determinant below 0 means a swap before it.

    Returns:
        Number of quarter turns (0 to 3), and True if left and right are swapped first.

    Raises:
        MediaError: unreadable, for a display matrix that is not a quarter turn.
    """
    held: Any = frame.side_data  # PyAV's type, a mapping of names, is wrong
    side = held.get(SideDataType.DISPLAYMATRIX)
    if side is None:
        return 0, False
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(side))
    turns = {(0, 1): 0, (-1, 0): 3, (0, -1): 2, (1, 0): 1}.get((_sign(c), _sign(d)))
    if turns is None or bool(a) == bool(b):
        raise MediaError(
            "unreadable",
            f"{path}: its display matrix turns frames by {frame.rotation} degrees; expected a "
            "multiple of 90: encode the video upright first",
        )
    return turns, a * d - b * c < 0


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)
