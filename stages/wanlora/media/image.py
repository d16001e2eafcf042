"""Still images: clips of one frame.

Owns: how image files become upright RGB.
Dimensions: h height, w width in px.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from wanlora.errors import MediaError

ANIMATED = frozenset({"PNG", "WEBP"})
"""Formats that hold a still or a moving picture. More pictures in a TIFF or in a phone's JPEG are
smaller copies or other pages, and the first is taken."""
MAX_PIXELS = 89_478_485
"""Largest image that is decoded: 256 MiB of RGB, where Pillow starts to suspect a bomb."""


@dataclass(frozen=True, slots=True)
class Picture:
    """What an image file holds; size upright.

    Attributes:
        alpha: Whether it has transparency, which is shown on white.
    """

    width: int
    height: int
    alpha: bool


def read(path: Path) -> UInt8[np.ndarray, "1 h w 3"]:
    """Read an image as a clip of one frame: upright by its EXIF tag, transparency on white.

    Raises:
        MediaError: missing or unreadable.
    """
    return np.asarray(_load(path)[0])[None].copy()


def read_checked(path: Path) -> Picture:
    """Read all of an image to see that it is whole, and say what it is.

    Raises:
        MediaError: As `read`.
    """
    image, alpha = _load(path)
    return Picture(image.width, image.height, alpha)


def _load(path: Path) -> tuple[Image.Image, bool]:
    """Decode to upright RGB, and say whether it was transparent."""
    try:
        with path.open("rb") as opened, Image.open(opened) as file:
            _require_size(file)
            _require_still(file)
            upright = _in_eight_bits(ImageOps.exif_transpose(file))
            if "A" not in upright.getbands() and "transparency" not in upright.info:
                return upright.convert("RGB"), False
            ground = Image.new("RGBA", upright.size, "white")
            return Image.alpha_composite(ground, upright.convert("RGBA")).convert("RGB"), True
    except FileNotFoundError:
        raise MediaError("missing", f"{path}: there is no such file") from None
    except Exception as error:  # a damaged image raises any of OSError, SyntaxError, struct.error
        if isinstance(error, MemoryError):
            raise
        raise MediaError("unreadable", f"{path} is no image that can be read: {error}") from None


def _in_eight_bits(picture: Image.Image) -> Image.Image:
    """Keep the high byte of 16-bit grey, as Pillow does of colour; it would clip grey."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers of no known range; expected 8 or 16 bits")
    return picture


def _require_still(file: Image.Image) -> None:
    number = getattr(file, "n_frames", 1)
    if file.format in ANIMATED and number > 1:
        raise ValueError(f"it moves, in {number} pictures; convert it to a video")


def _require_size(file: Image.Image) -> None:
    """Refuse a decompression bomb. Not by Pillow's warning: filters are shared by all threads."""
    if file.width * file.height > MAX_PIXELS:
        raise ValueError(
            f"it has {file.width}x{file.height} pixels, expected at most {MAX_PIXELS:,}"
        )
