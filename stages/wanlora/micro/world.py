"""Drawn videos of a stick person: what the demo trains on, so that nothing is downloaded.

Owns: activities, colours, captions and their drawing. Everything is a function of the seed.
Coordinates: x right, y down, both in [0, 1]; time in [0, 1] over the video.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from wanlora.core.rng import Stream, generator

SIZE_PX = 128
NUM_FRAMES = 48
FPS = 24
LIMB_RADIUS = 0.028
HEAD_RADIUS = 0.075

COLOURS = {
    "red": (214, 58, 48),
    "green": (64, 168, 80),
    "blue": (56, 96, 208),
    "yellow": (226, 190, 60),
}
BACKGROUNDS = {"white": (240, 240, 236), "black": (22, 22, 26), "gray": (128, 130, 134)}
ACTIVITIES = ("clapping", "sitting", "walking")

Point = tuple[float, float]


class Drawing(NamedTuple):
    """A drawn video and its caption."""

    frames: UInt8[np.ndarray, "t h w 3"]
    caption: str


def draw(activity: str, seed: int) -> Drawing:
    """Draw one person at one activity; colours, place and phase follow from the seed."""
    draws = generator(seed, Stream.VALIDATION, ACTIVITIES.index(activity))
    colour = list(COLOURS)[draws.integers(len(COLOURS))]
    background = list(BACKGROUNDS)[draws.integers(len(BACKGROUNDS))]
    centre, phase = 0.5 + 0.12 * (draws.random() - 0.5), draws.random()
    frames = np.empty((NUM_FRAMES, SIZE_PX, SIZE_PX, 3), np.uint8)
    for index in range(NUM_FRAMES):
        time = index / NUM_FRAMES
        cover = _cover(_person(activity, time, phase, centre))
        frames[index] = np.rint(
            cover[..., None] * np.array(COLOURS[colour])
            + (1 - cover[..., None]) * np.array(BACKGROUNDS[background])
        )
    return Drawing(frames, f"a {colour} person {activity} on a {background} background")


def _person(activity: str, time: float, phase: float, x: float) -> list[tuple[Point, Point, float]]:
    """Limbs as (from, to, radius) of one frame."""
    swing = math.sin(2 * math.pi * (2 * time + phase))
    down = 0.0
    hands, feet = [(x - 0.14, 0.58), (x + 0.14, 0.58)], [(x - 0.09, 0.9), (x + 0.09, 0.9)]
    knees = None
    if activity == "clapping":
        gap = 0.015 + 0.11 * (0.5 + 0.5 * swing)
        hands = [(x - gap, 0.42), (x + gap, 0.42)]
    elif activity == "walking":
        x = 0.2 + 0.6 * (time if phase < 0.5 else 1 - time)
        hands = [(x - 0.12 * swing, 0.56), (x + 0.12 * swing, 0.56)]
        feet = [(x + 0.15 * swing, 0.9), (x - 0.15 * swing, 0.9)]
    elif activity == "sitting":
        down = 0.18 * min(1.0, max(0.0, 2.2 * time - 0.3))
        knees = [(x + 0.9 * down - 0.06, 0.72), (x + 0.9 * down + 0.06, 0.72)]
    neck, hip = (x, 0.3 + down), (x, 0.58 + down)
    limbs = [((x, 0.2 + down), (x, 0.2 + down), HEAD_RADIUS), (neck, hip, LIMB_RADIUS * 1.3)]
    for index in range(2):
        hand = (hands[index][0], hands[index][1] + down)
        limbs.append(((x, 0.36 + down), hand, LIMB_RADIUS))
        if knees:
            limbs += [(hip, knees[index], LIMB_RADIUS), (knees[index], feet[index], LIMB_RADIUS)]
        else:
            limbs.append((hip, feet[index], LIMB_RADIUS))
    return limbs


def _cover(limbs: list[tuple[Point, Point, float]]) -> Float[np.ndarray, "h w"]:
    """How much of each pixel the limbs cover: distance to round-ended strokes, one pixel soft."""
    grid = (np.arange(SIZE_PX) + 0.5) / SIZE_PX
    px, py = np.meshgrid(grid, grid)
    nearest = np.full((SIZE_PX, SIZE_PX), np.inf)
    for (ax, ay), (bx, by), radius in limbs:
        dx, dy = bx - ax, by - ay
        along = np.clip(((px - ax) * dx + (py - ay) * dy) / max(dx * dx + dy * dy, 1e-9), 0, 1)
        distance = np.hypot(px - ax - along * dx, py - ay - along * dy) - radius
        nearest = np.minimum(nearest, distance)
    return np.clip(0.5 - nearest * SIZE_PX, 0, 1)
