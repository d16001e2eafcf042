"""Sizes of pictures: the bucket that keeps an aspect, the size that covers a clip, the largest.

Owns: the sizes and lengths of `prepare --buckets`, and the bound on pictures and scaled frames.
Pure arithmetic; sizes in px.
"""

from fractions import Fraction

from wanlora.core.buckets import SIZE_MULTIPLE

MAX_RATIO = 3
"""Maximum ratio of the longest side to the shortest; a wider picture is cropped to this."""

LENGTH_STEP = 16
"""Frames between buckets of length: 17, 33, 49, 65, 81 ..., few enough that each has some clips."""

MAX_PICTURE_PX = 89_478_485
"""Maximum pixels of a decoded or scaled picture: 256 MiB of RGB, above which Pillow suspects a
decompression bomb (`Image.MAX_IMAGE_PIXELS`). 8K video has 33 million."""


def is_hd(height: int, width: int) -> bool:
    """Test whether players treat this size as HD: BT.709 colours unless the file is tagged.

    Source: `mp_csp_guess_colorspace` of mpv (video/csputils.c); VLC and Kodi also draw the line at
    576 lines.
    """
    return width >= 1280 or height > 576


def size_problem(height: int, width: int) -> str | None:
    """Describe why a picture of a declared size is not decoded, or None."""
    if height * width > MAX_PICTURE_PX:
        return f"pictures of {width}x{height} px; expected at most {MAX_PICTURE_PX:,} px"
    return None


def cover_size(
    frame_height: int,
    frame_width: int,
    *,
    height: int,
    width: int,
    sample_aspect: Fraction = Fraction(1),
) -> tuple[int, int]:
    """Smallest size (height, width) in the frame's displayed proportions that covers the clip."""
    displayed_width = frame_width * sample_aspect
    scale = max(Fraction(height, frame_height), width / displayed_width)
    return max(height, round(frame_height * scale)), max(width, round(displayed_width * scale))


def cover_problem(
    frame_height: int,
    frame_width: int,
    *,
    height: int,
    width: int,
    sample_aspect: Fraction = Fraction(1),
) -> str | None:
    """Describe why a frame is too long and narrow to cover a clip, or None.

    A picture of 1 x 12000 px would have to be scaled to 832 x 9,984,000 px.
    """
    scaled = cover_size(
        frame_height, frame_width, height=height, width=width, sample_aspect=sample_aspect
    )
    if scaled[0] * scaled[1] <= MAX_PICTURE_PX:
        return None
    return (
        f"a picture of {frame_width}x{frame_height} px (sample aspect {sample_aspect}) becomes "
        f"{scaled[1]}x{scaled[0]} px to cover {width}x{height}; expected at most "
        f"{MAX_PICTURE_PX:,} px: crop it first"
    )


def nearest_size(display_width: Fraction, display_height: int, *, area: int) -> tuple[int, int]:
    """Choose the size (height, width) with the largest product of area and share of picture kept.

    A picture of aspect a that covers a bucket of aspect b and is cropped keeps min(a/b, b/a). So
    cropping a few lines wins over a smaller bucket: 16:9 gives 480x832. If two products are
    equal, the size that keeps more of the picture wins.

    Args:
        display_width: Width of the picture with square pixels, upright.
        display_height: Height of the picture, upright.
        area: Maximum number of pixels, for example 480 * 832.
    """
    aspect = display_width / display_height

    def merit(size: tuple[int, int]) -> tuple[Fraction, Fraction]:
        ratio = Fraction(size[1], size[0]) / aspect
        kept = min(ratio, 1 / ratio)
        return kept * size[0] * size[1], kept

    return max(sizes(area), key=merit)


def sizes(area: int) -> list[tuple[int, int]]:
    """Every candidate (height, width): for each width the two largest heights that fit.

    Multiples of 16, at most `area` px, at most 3:1.
    """
    step = SIZE_MULTIPLE
    found = []
    for width in range(step, area // step + 1, step):
        most = area // width // step * step
        found += [
            (height, width)
            for height in (most, most - step)
            if height > 0 and max(width, height) <= MAX_RATIO * min(width, height)
        ]
    return found
