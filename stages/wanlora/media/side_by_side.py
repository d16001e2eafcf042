"""Videos beside each other, each under its name.

Owns: the layout of a comparison. Dimensions: t frames, h height, w width in px.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

GAP_PX = 4
GROUND = (22, 26, 33)
INK = (229, 233, 240)


def side_by_side(
    videos: Mapping[str, UInt8[np.ndarray, "t h w 3"]],
) -> UInt8[np.ndarray, "t hh ww 3"]:
    """Put videos of one size next to each other, with a line of text above each.

    Args:
        videos: Name to frames.
    """
    shape = next(iter(videos.values())).shape
    assert all(frames.shape == shape for frames in videos.values()), "videos of several sizes"
    num_frames, height, width, _ = shape
    band = max(16, 2 * round(height / 24))
    step = width + GAP_PX
    canvas = np.empty((num_frames, band + height, len(videos) * step - GAP_PX, 3), np.uint8)
    canvas[:] = GROUND
    for place, (name, frames) in enumerate(videos.items()):
        left = place * step
        canvas[:, :band, left : left + width] = _label(name, band, width)
        canvas[:, band:, left : left + width] = frames
    return canvas


def _label(text: str, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    picture = Image.new("RGB", (width, height), GROUND)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=0.7 * height)
    while len(text) > 1 and draw.textlength(text, font=font) > width - 8:
        text = f"{text.rstrip('…')[:-1]}…"
    draw.text((4, height / 2), text, fill=INK, font=font, anchor="lm")
    return np.asarray(picture)
