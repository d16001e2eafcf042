"""Still images: clips of one frame.

Owns: the conversion of image files to upright RGB.
Dimensions: h height, w width in px.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from wanlora.core.aspect import MAX_PICTURE_PX, size_problem
from wanlora.errors import MediaError
from wanlora.media.source import reading

ANIMATED = frozenset({"PNG", "WEBP"})
"""Formats that hold a still or a moving picture. More pictures in a TIFF or in a phone's JPEG are
smaller copies or other pages, and the first is taken."""


@dataclass(frozen=True, slots=True)
class Picture:
    """Properties of an image file; its size is that of the upright image.

    Attributes:
        alpha: True if the image has transparency, which is shown on white.
    """

    width: int
    height: int
    alpha: bool


def read(path: Path) -> UInt8[np.ndarray, "1 h w 3"]:
    """Read an image as a clip of one frame: upright by its EXIF tag, transparency on white.

    Raises:
        MediaError: missing; bad_size, by the header, for more than `MAX_PICTURE_PX`; unreadable.
    """
    return np.asarray(_load(path)[0])[None].copy()


def read_checked(path: Path) -> Picture:
    """Read all of an image to check that it is complete, and return its properties.

    Raises:
        MediaError: As `read`.
    """
    image, alpha = _load(path)
    return Picture(image.width, image.height, alpha)


def _load(path: Path) -> tuple[Image.Image, bool]:
    """Decode to upright RGB; the second value is True if parts were transparent."""
    with reading(path), path.open("rb") as opened, _opened(path, opened) as file:
        _require_still(path, file)
        upright = _in_eight_bits(path, ImageOps.exif_transpose(file))
        if "A" not in upright.getbands() and "transparency" not in upright.info:
            return upright.convert("RGB"), False
        ground = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(ground, upright.convert("RGBA")).convert("RGB"), True


def _opened(path: Path, file: IO[bytes]) -> Image.Image:
    """Read the header. Pillow refuses or warns about a large picture even before its own size."""
    try:
        picture = Image.open(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(
            "bad_size", f"{path}: {error} Expected at most {MAX_PICTURE_PX:,} px"
        ) from None
    except UnidentifiedImageError:
        raise MediaError(
            "unreadable", f"{path} is not an image that Pillow can read; expected JPEG, PNG or WebP"
        ) from None
    if problem := size_problem(picture.height, picture.width):
        raise MediaError("bad_size", f"{path}: {problem}")
    return picture


def _in_eight_bits(path: Path, picture: Image.Image) -> Image.Image:
    """Keep the high byte of 16-bit grey. Pillow does this for colour, but clips grey."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise MediaError(
            "unreadable",
            f"{path}: pixels are 32-bit numbers of unknown range; expected 8 or 16 bits",
        )
    return picture


def _require_still(path: Path, file: Image.Image) -> None:
    number = getattr(file, "n_frames", 1)
    if file.format in ANIMATED and number > 1:
        raise MediaError(
            "unreadable", f"{path}: a moving picture of {number} frames; convert it to a video"
        )
