"""Score the silhouettes of a clip: are circles round, and are hands at the end of arms?

Owns: the shape score on the embedded model's card. A frame's score is the intersection over union
of its silhouette with the nearest silhouette that `world` draws of the same concept, over position
(steps of 1/4 pixel), moment of the movement and size. Colour does not matter.
Dimensions: t frames, n drawn silhouettes, h and w pixels, y and x points of the fine grid.
"""

import functools
import itertools

import numpy as np
from jaxtyping import Bool, Float, UInt8

from wanlora.micro import recognise, world

SIZES = np.linspace(0.9, 1.1, 9)
MOMENTS = np.linspace(0, 1.2, 25)
FINE = 4
"""Positions per pixel."""
REACH = 3
"""Positions searched to each side: whole pixels from equal centroids, then fine ones."""


def score(frames: UInt8[np.ndarray, "t h w 3"], concept: str) -> Float[np.ndarray, " t"]:
    """Shape score of each frame, 0 to 1, for the concept that the prompt named."""
    return np.array([nearest(mask, concept) for mask in recognise.cover_of(frames)[2] > 0.5])


def nearest(mask: Bool[np.ndarray, "h w"], concept: str) -> float:
    """Intersection over union with the nearest drawn silhouette; 0 for an empty mask."""
    if not mask.any():
        return 0.0
    # Drawn silhouettes have their centroids in the middle of a canvas twice the picture's size.
    place = tuple(
        np.rint(FINE * (world.SIZE_PX - 0.5 - np.argwhere(mask).mean(axis=0))).astype(int)
    )
    best = 0.0
    for step in (FINE, 1):
        steps = [step * count for count in range(-REACH, REACH + 1)]
        places = [(place[0] + dy, place[1] + dx) for dy, dx in itertools.product(steps, steps)]
        best, place = max((_overlap(mask, concept, *place), place) for place in places)
    return best


def _overlap(mask: Bool[np.ndarray, "h w"], concept: str, top: int, left: int) -> float:
    """Largest intersection over union with the drawn silhouettes cut at a fine position."""
    (row, y), (column, x) = divmod(top, FINE), divmod(left, FINE)
    drawn = _drawn(concept)[
        y, x, :, row : row + world.SIZE_PX, column : column + world.SIZE_PX
    ]  # fmt: skip
    both, either = (drawn & mask).sum(axis=(1, 2)), (drawn | mask).sum(axis=(1, 2))
    return float((both / either).max())


@functools.cache
def _drawn(concept: str) -> Bool[np.ndarray, "fine fine n y x"]:
    """Silhouettes in all sizes and moments, their centroids in the middle; fine positions first."""
    size_px, margin = 5 * world.SIZE_PX * FINE // 4, 3 * world.SIZE_PX * FINE // 8
    line = ((np.arange(size_px, dtype=np.float32) + 0.5) / size_px - 0.5) * 1.25
    moments = (0.0,) if concept in world.SHAPES else MOMENTS
    made = []
    for moment, size in itertools.product(moments, SIZES):
        x, y = np.meshgrid(line / np.float32(size) + 0.5, line / np.float32(size) + 0.5)
        mask = np.pad(world.figure(concept, float(moment), (x, y)) > 0.5, margin)
        shift = np.rint(len(mask) / 2 - 0.5 - np.argwhere(mask).mean(axis=0)).astype(int)
        made.append(np.roll(mask, tuple(shift), axis=(0, 1)))
    cut = np.stack(made).reshape(len(made), -1, FINE, 2 * world.SIZE_PX, FINE)
    return np.ascontiguousarray(cut.transpose(2, 4, 0, 1, 3))
