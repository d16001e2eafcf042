"""Sizes that Wan takes: of clips for its VAE and patches, of their latents, of prompts.

Owns: the arithmetic of frames, height and width. Must not know: files, models.
Source: AutoencoderKLWan (x8 in space, x4 in time, the first frame alone) and
WanTransformer3DModel (patch 1 x 2 x 2).
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

SPATIAL_FACTOR = 8
TEMPORAL_FACTOR = 4
PATCH = (1, 2, 2)
SIZE_MULTIPLE = SPATIAL_FACTOR * PATCH[1]
MAX_TOKENS = 512
"""Rows of the padded prompt embedding that Wan's transformer consumes; a longer caption is cut."""
MAX_FRAMES = 10_001
MAX_SIDE_PX = 16_384
MAX_CLIP_PX = 2**30
"""Pixels of a clip, all frames: 3.2 GB decoded. 81x480x832 has 32 million."""
MIN_FPS, MAX_FPS = 0.1, 1000.0
DEFAULT_FPS = 16.0
"""Frames per second of Wan 2.1 (`sample_fps` in wan/configs/shared_config.py of its code)."""
"""Frame rates are taken as fractions with a denominator of at most 1001."""


class Bucket(NamedTuple):
    """Frames, height and width of a clip. Only clips of one bucket can share a batch."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


def problem_with(bucket: Bucket) -> str | None:
    """Describe why Wan cannot use this size; None if it can.

    The VAE silently drops the frames past 4k+1 and floors odd sizes, so both are refused.
    """
    frames, height, width = bucket
    if frames < 1 or (frames - 1) % TEMPORAL_FACTOR:
        below = max(1, frames - (frames - 1) % TEMPORAL_FACTOR)
        return (
            f"{frames} frames; expected 4k+1 (the VAE would silently drop the rest): "
            f"use {below} or {below + TEMPORAL_FACTOR}"
        )
    for name, value in (("height", height), ("width", width)):
        if value < SIZE_MULTIPLE or value % SIZE_MULTIPLE:
            below = max(SIZE_MULTIPLE, value - value % SIZE_MULTIPLE)
            return (
                f"{name} {value} px; expected a multiple of {SIZE_MULTIPLE}: "
                f"use {below} or {below + SIZE_MULTIPLE}"
            )
    return _too_large(bucket)


def _too_large(bucket: Bucket) -> str | None:
    frames, height, width = bucket
    if frames > MAX_FRAMES:
        return f"{frames:,} frames; expected at most {MAX_FRAMES:,}"
    if max(height, width) > MAX_SIDE_PX:
        return f"{height}x{width} px; expected at most {MAX_SIDE_PX:,} px for each side"
    if frames * height * width > MAX_CLIP_PX:
        return f"{frames}x{height}x{width} is over {MAX_CLIP_PX:,} pixels; use a smaller clip"
    return None


def usual(buckets: Iterable[Bucket]) -> Bucket:
    """The most common size; the size of still images only if there are no videos."""
    number = Counter(buckets)
    return max(number, key=lambda bucket: (bucket.num_frames > 1, number[bucket]))


def latent_shape(bucket: Bucket, channels: int = 16) -> tuple[int, int, int, int]:
    """Shape `C F H W` of the latents of one clip; 81x480x832 gives (16, 21, 60, 104)."""
    assert problem_with(bucket) is None, bucket
    frames, height, width = bucket
    return (
        channels,
        1 + (frames - 1) // TEMPORAL_FACTOR,
        height // SPATIAL_FACTOR,
        width // SPATIAL_FACTOR,
    )


def num_tokens(bucket: Bucket) -> int:
    """Length of the transformer's sequence; 81x480x832 gives 32,760."""
    _, frames, height, width = latent_shape(bucket)
    return (frames // PATCH[0]) * (height // PATCH[1]) * (width // PATCH[2])
