"""Recognise the concept and direction of a clip of the drawn world, if it shows one.

Owns: the recogniser that measures the embedded model and its adapters. It is not trained: a clip
gets the concept of the nearest drawn clip, if the match is good enough. Position does not matter
(both are centred), and neither do colour and background.

With cover c(t) of a clip, its mean over time m and motion c − m, and the same of a drawn clip r:

    match = 1 − ‖c − r‖² / (‖c − m‖² + ‖r − m_r‖²)

1 is the same clip; a frozen clip, even one frozen in a pose of r, is at 0 or below.
Dimensions: t frames, h and w pixels, n drawn clips, d values.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from wanlora.micro import world

LEAST_MATCH = 0.4
"""Minimum match; below it nothing is recognised."""
LEAST_TRAVEL = 0.1
"""Minimum movement for a direction, as a share of the picture's width."""
EXAMPLES_PER_CONCEPT = 48
_FIRST_SEED = 5_000_000
"""No clip with a seed near this one is used in training or measurement."""


class Seen(NamedTuple):
    """Content of a clip; `concept` and `direction` are None if nothing is recognised."""

    concept: str | None
    colour: str
    background: str
    direction: str | None
    match: float


def recognise(frames: UInt8[np.ndarray, "t h w 3"]) -> Seen:
    """Recognise a clip."""
    colour, background, cover = cover_of(frames)
    features = _features(cover)
    matches = match_examples(features)
    best = int(np.argmax(matches))
    concept = world.CONCEPTS[best // EXAMPLES_PER_CONCEPT]
    match = float(matches[best])
    found = concept if match >= LEAST_MATCH else None
    return Seen(found, colour, background, direction_of(cover), match)


def cover_of(
    frames: UInt8[np.ndarray, "t h w 3"],
) -> tuple[str, str, Float[np.ndarray, "t h w"]]:
    """Colour, background and cover: each pixel's share of the way from background to colour."""
    pixels = frames.astype(np.float32)
    rim = np.concatenate([pixels[:, :3].reshape(-1, 3), pixels[:, -3:].reshape(-1, 3)])
    back = np.median(rim, axis=0)
    offset = pixels - back
    distance = np.linalg.norm(offset, axis=-1)
    covered = distance > 0.7 * np.quantile(distance, 0.97)
    front = np.median(pixels[covered], axis=0) if covered.any() else back
    towards = front - back
    share = offset @ towards / max(float(towards @ towards), 1.0)
    colour, background = _nearest(front, world.COLOURS), _nearest(back, world.BACKGROUNDS)
    return colour, background, np.clip(share, 0, 1)


def direction_of(cover: Float[np.ndarray, "t h w"]) -> str | None:
    """Direction in which the centre of the cover moves, by least squares over time."""
    middles = np.array([_middle(frame) for frame in cover]) / cover.shape[-1]
    times = np.linspace(-0.5, 0.5, len(cover))
    travel = times @ (middles - middles.mean(axis=0)) / (times @ times)
    axis = int(np.argmax(np.abs(travel)))
    if abs(travel[axis]) < LEAST_TRAVEL:
        return None
    return (("up", "down"), ("left", "right"))[axis][int(travel[axis] > 0)]


def match_examples(features: Float[np.ndarray, " d"]) -> Float[np.ndarray, " n"]:
    """Match of a clip with every drawn clip."""
    examples, motions = _examples()
    apart = np.square(examples).sum(1) + np.square(features).sum() - 2 * examples @ features
    matches: np.ndarray = 1 - apart / (motions + _motion(features))
    return matches


@functools.cache
def _examples() -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, " n"]]:
    """Features of drawn clips, concepts slowest, and their motion."""
    features = np.stack(
        [
            _features(world.cover(concept, _FIRST_SEED + index))
            for concept in world.CONCEPTS
            for index in range(EXAMPLES_PER_CONCEPT)
        ]
    )
    return features, np.array([_motion(row) for row in features])


def _features(cover: Float[np.ndarray, "t h w"]) -> Float[np.ndarray, " d"]:
    """Cover with the middle of its mean over time in the centre, at 32 x 32."""
    size = cover.shape[-1]
    shift = np.rint(size / 2 - 0.5 - _middle(cover.mean(axis=0))).astype(int)
    centred = np.roll(cover, tuple(shift), axis=(1, 2))
    block = size // 32
    small = centred.reshape(len(cover), 32, block, 32, block).mean(axis=(2, 4))
    features: np.ndarray = small.astype(np.float32).ravel()
    return features


def _motion(features: Float[np.ndarray, " d"]) -> float:
    clip = features.reshape(world.NUM_FRAMES, -1)
    return float(np.square(clip - clip.mean(axis=0)).sum())


def _middle(frame: Float[np.ndarray, "h w"]) -> Float[np.ndarray, " 2"]:
    """Row and column of the centre of the cover; of the picture if nothing is covered."""
    solid = np.where(frame > 0.15, frame, 0)
    total = float(solid.sum())
    if total == 0:
        return np.array(frame.shape) / 2 - 0.5
    rows, columns = np.arange(frame.shape[0]), np.arange(frame.shape[1])
    return np.array([solid.sum(1) @ rows, solid.sum(0) @ columns]) / total


def _nearest(pixel: np.ndarray, colours: dict[str, tuple[int, int, int]]) -> str:
    return min(colours, key=lambda name: float(np.linalg.norm(pixel - np.array(colours[name]))))
