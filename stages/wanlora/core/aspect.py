"""Which size keeps a picture's aspect: the bucket rule.

Owns: the ladder of sizes and lengths of `prepare --buckets`. Pure arithmetic; sizes in px.
"""

from fractions import Fraction

from wanlora.core.buckets import SIZE_MULTIPLE

MAX_RATIO = 3
"""Longest side over shortest; a wider picture is cropped to this."""

LENGTH_STEP = 16
"""Buckets of length are 17, 33, 49, 65, 81 ... frames: few enough that each holds some clips."""


def nearest_size(display_width: Fraction, display_height: int, *, area: int) -> tuple[int, int]:
    """Choose the size (height, width) with the largest product of area and share of picture kept.

    A picture of aspect a that covers a bucket of aspect b and is cropped keeps min(a/b, b/a). So a
    few lines are cropped rather than a bucket made smaller: 16:9 gives 480x832. Of equal products
    the one that keeps more is taken.

    Args:
        display_width: Of the picture with square pixels, upright.
        display_height: Of the picture, upright.
        area: Most pixels, for example 480 * 832.
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
