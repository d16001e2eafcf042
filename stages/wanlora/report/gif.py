"""The GIF writer: frames to an animation that repeats.

Owns: palettes and the times of the frames. Must not know: what the frames show, or files.
Dimensions: t frames, h and w pixels.
"""

import io
from itertools import pairwise

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def gif(
    frames: UInt8[np.ndarray, "t h w 3"],
    *,
    fps: float,
    colours: int = 256,
    shared_palette: bool = False,
    comment: str = "",
) -> bytes:
    """Encode an animation that repeats.

    A GIF counts time in 10 ms. Each frame starts at its own time rounded to that, so that the
    length is kept: at 16 fps, 81 frames last 5.06 s, not 81 x 60 ms.

    Args:
        frames: At least one.
        fps: Frames per second.
        colours: Size of a palette, at most 256.
        shared_palette: Use one palette, dithered, so that flat areas do not flicker; otherwise each
            frame has its own.
        comment: Text that the file carries.
    """
    images = [Image.fromarray(np.ascontiguousarray(pixels)) for pixels in frames]
    palette = None
    if shared_palette:
        palette = Image.fromarray(np.concatenate(list(frames))).quantize(colours)
    first, *others = (image.quantize(colours, palette=palette) for image in images)
    starts = [round(100 * number / fps) for number in range(len(images) + 1)]
    buffer = io.BytesIO()
    first.save(
        buffer, "GIF", save_all=True, append_images=others, loop=0,
        duration=[10 * (end - start) for start, end in pairwise(starts)],
        comment=comment.encode(),
    )  # fmt: skip
    return buffer.getvalue()
