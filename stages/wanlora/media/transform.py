"""Resize frames to a clip's size: cover, then crop the centre.

Owns: the pixel rules of resizing; a change of them is a new `clip.TRANSFORM_REVISION`.
Dimensions: t frames, c = 3 channels, h height, w width in px.
"""

from fractions import Fraction

import numpy as np
import torch
from jaxtyping import UInt8
from torch.nn.functional import interpolate

from wanlora.core.aspect import cover_size


def resize_and_crop(
    frames: UInt8[np.ndarray, "t hh ww 3"],
    *,
    height: int,
    width: int,
    sample_aspect: Fraction = Fraction(1),
) -> UInt8[torch.Tensor, "t 3 h w"]:
    """Scale to cover the clip, bicubic with antialias on uint8, and crop the centre.

    Without antialias, or with area resampling, fine texture aliases 7 to 50 times more.

    Args:
        frames: Decoded frames.
        height: Height of the clip, px.
        width: Width of the clip, px.
        sample_aspect: Width over height of one pixel of `frames`; the output has square pixels.
    """
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    size = cover_size(
        pixels.shape[2], pixels.shape[3], height=height, width=width, sample_aspect=sample_aspect
    )
    if size != tuple(pixels.shape[2:]):
        pixels = interpolate(pixels, size=size, mode="bicubic", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[:, :, top : top + height, left : left + width].contiguous()
