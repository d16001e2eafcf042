"""The drawn world: captioned clips of moving shapes and of a person's activities.

Owns: its concepts, their movement and their captions. A clip is a function of (concept, seed). The
embedded model is pretrained on `KNOWN` only; the concepts of `HELD_OUT` are for adapters.

Coordinates: x right, y down, both in [0, 1]; time in [0, 1] over a clip, in which an arm swings
once, one way: four frames share a latent frame, and the VAE blurs a movement back and forth in one.
Dimensions: t frames, n strokes, h and w pixels.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from wanlora.core.rng import Stream, generator

NUM_FRAMES = 17
SIZE_PX = 64
FPS = 16

COLOURS = {
    "red": (214, 58, 48),
    "green": (64, 168, 80),
    "blue": (56, 96, 208),
    "yellow": (226, 190, 60),
    "purple": (150, 60, 180),
    "cyan": (60, 190, 210),
}
BACKGROUNDS = {"white": (235, 235, 232), "black": (22, 22, 26), "gray": (128, 130, 134)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

SHAPES = ("circle", "square", "triangle", "striped")
KNOWN = ("circle", "square", "waving", "walking", "jumping", "sitting")
HELD_OUT = ("clapping", "striped", "triangle")
CONCEPTS = (*KNOWN, *HELD_OUT)

EDGE = 1 / 32
"""Width of a soft edge: two pixels at 64."""
LIMB, TORSO, HEAD = 0.066, 0.078, 0.095
"""Radii of the strokes of a person."""

Point = tuple[float, float]
Stroke = tuple[Point, Point, float]
Grid = tuple[Float[np.ndarray, "h w"], Float[np.ndarray, "h w"]]


class Scene(NamedTuple):
    """Content of a clip; `direction` is None for a person."""

    concept: str
    colour: str
    background: str
    direction: str | None

    @property
    def caption(self) -> str:
        """Caption, for example `a red circle moving left on a black background`."""
        where = f"on a {self.background} background"
        if self.direction is None:
            return f"a {self.colour} person {self.concept} {where}"
        thing = f"{self.colour} {self.concept}"
        if self.concept == "striped":
            thing = f"striped {self.colour} square"
        return f"a {thing} moving {self.direction} {where}"


class Drawing(NamedTuple):
    """A drawn clip and its content."""

    frames: UInt8[np.ndarray, "t h w 3"]
    scene: Scene


def scene(concept: str, seed: int) -> Scene:
    """Choose colours and direction; a function of (concept, seed)."""
    return _scene(concept, _draws(concept, seed))


def draw(concept: str, seed: int, *, size_px: int = SIZE_PX) -> Drawing:
    """Draw the clip of (concept, seed)."""
    drawn = scene(concept, seed)
    return Drawing(paint(cover(concept, seed, size_px=size_px), drawn), drawn)


def paint(cover: Float[np.ndarray, "t h w"], scene: Scene) -> UInt8[np.ndarray, "t h w 3"]:
    """Colour a clip: pixels that are not covered show the background."""
    front = np.array(COLOURS[scene.colour], np.float32)
    back = np.array(BACKGROUNDS[scene.background], np.float32)
    painted: np.ndarray = np.rint(cover[..., None] * (front - back) + back)
    return painted.astype(np.uint8)


def cover(concept: str, seed: int, *, size_px: int = SIZE_PX) -> Float[np.ndarray, "t h w"]:
    """Draw the share of each pixel that is covered, in [0, 1], which `draw` then paints."""
    draws = _draws(concept, seed)
    direction = _scene(concept, draws).direction
    times = np.linspace(0, 1, NUM_FRAMES)
    if direction is not None:
        return _moving_shape(concept, DIRECTIONS[direction], times, draws, size_px)
    place, phase = 0.1 * (draws.random() - 0.5), 0.2 * draws.random()
    frames = [_person(concept, time, phase, 0.5 + place) for time in times]
    return _strokes(frames, _grid(size_px))


def figure(concept: str, time: float, grid: Grid) -> Float[np.ndarray, "h w"]:
    """Draw one frame of a concept on any grid of points, without its movement through the picture.

    Args:
        concept: One of `CONCEPTS`.
        time: Moment of an activity, 0 to 1.2 (the latest phase included); shapes ignore it.
        grid: Coordinates x and y of each point.
    """
    if concept in SHAPES:
        return _shape(concept, grid[0] - 0.5, grid[1] - 0.5)
    drawn: np.ndarray = _strokes([_person(concept, time, 0.0, 0.5)], grid)[0]
    return drawn


def _draws(concept: str, seed: int) -> np.random.Generator:
    return generator(seed, Stream.WORLD, CONCEPTS.index(concept))


def _scene(concept: str, draws: np.random.Generator) -> Scene:
    colour, background = draws.integers(len(COLOURS)), draws.integers(len(BACKGROUNDS))
    direction = draws.integers(len(DIRECTIONS))
    return Scene(
        concept,
        list(COLOURS)[colour],
        list(BACKGROUNDS)[background],
        list(DIRECTIONS)[direction] if concept in SHAPES else None,
    )


def _moving_shape(
    concept: str, direction: Point, times: np.ndarray, draws: np.random.Generator, size_px: int
) -> Float[np.ndarray, "t h w"]:
    """A shape that crosses the middle of the picture at an even speed."""
    aside, travel = 0.16 * (draws.random() - 0.5), 0.36 + 0.08 * (draws.random() - 0.5)
    along = travel * (times - 0.5)
    x = 0.5 + direction[0] * along + abs(direction[1]) * aside
    y = 0.5 + direction[1] * along + abs(direction[0]) * aside
    px, py = _grid(size_px)
    return _shape(concept, px - x[:, None, None], py - y[:, None, None])


def _shape(concept: str, dx: np.ndarray, dy: np.ndarray) -> Float[np.ndarray, "*points"]:
    """Cover by a shape, from the distances to its middle."""
    if concept == "circle":
        return _soft(np.hypot(dx, dy) - 0.15)
    if concept == "triangle":
        leaning = np.cos(math.pi / 6) * np.abs(dx) - np.sin(math.pi / 6) * dy
        return _soft(np.maximum(leaning, dy) - 0.125)
    if concept == "square":
        return _soft(np.maximum(np.abs(dx), np.abs(dy)) - 0.18)
    bars = _soft(np.abs((dy + 0.085) % 0.17 - 0.085) - 0.047)  # three, with two gaps
    bars *= _soft(np.maximum(np.abs(dx), np.abs(dy)) - 0.21)
    return bars


def _person(activity: str, time: float, phase: float, x: float) -> list[Stroke]:
    """Strokes (from, to, radius) of one frame: head, torso, then arms and legs in two parts."""
    turn = math.pi * (time + phase)
    swing, lift = -math.cos(turn), math.sin(turn) ** 2
    y, down, broad = 0.0, 0.0, 0.07
    arms, legs = (25.0, 25.0), (14.0, 14.0)  # degrees outwards from straight down
    if activity == "waving":
        arms = (25.0, 130.0 + 42.0 * swing)
    elif activity == "clapping":
        arms = (132.0 + 46.0 * swing,) * 2
    elif activity == "jumping":
        y, arms, legs = -0.14 * lift, (40.0, 40.0), (7.0, 7.0)
    elif activity == "walking":
        # From the side, arms and legs overlap, so only half a turn is visible.
        x, broad, stride = x + 0.26 * (time - 0.5), 0.0, math.sin(turn)
        arms, legs = (-40.0 * stride,) * 2, (30.0 * stride,) * 2
    elif activity == "sitting":
        down = 0.2 * min(1.0, max(0.0, 1.4 * time - phase))
    head, neck, hip = (x, 0.24 + y + down), (x, 0.38 + y + down), (x, 0.6 + y + down)
    strokes: list[Stroke] = [(head, head, HEAD), (neck, hip, TORSO)]
    for side, arm, leg in zip((-1, 1), arms, legs, strict=True):
        shoulder = (neck[0] + broad * side, neck[1])
        strokes.append((shoulder, _end(shoulder, arm * side, 0.27), LIMB))
        strokes += _leg(hip, side, leg * side, down)
    return strokes


def _leg(hip: Point, side: int, angle: float, down: float) -> list[Stroke]:
    """A leg in two strokes: straight, or with the knee turned out if the hip is lowered."""
    foot = _end((hip[0], hip[1] - down), angle, 0.31)
    knee = ((hip[0] + foot[0]) / 2 + 0.75 * down * side, (hip[1] + foot[1]) / 2)
    return [(hip, knee, LIMB), (knee, foot, LIMB)]


def _end(start: Point, angle: float, length: float) -> Point:
    """End of a limb; the angle is in degrees from straight down, positive to the right."""
    turned = math.radians(angle)
    return start[0] + length * math.sin(turned), start[1] + length * math.cos(turned)


def _strokes(frames: list[list[Stroke]], grid: Grid) -> Float[np.ndarray, "t h w"]:
    """Cover by round-ended strokes: the nearest one decides."""
    strokes = np.array([[(*a, *b, radius) for a, b, radius in frame] for frame in frames])
    ax, ay, bx, by, radius = np.moveaxis(strokes.astype(np.float32), -1, 0)[..., None, None]
    px, py = grid
    dx, dy = bx - ax, by - ay
    along = ((px - ax) * dx + (py - ay) * dy) / np.maximum(dx * dx + dy * dy, 1e-9)
    along = np.clip(along, 0, 1)
    distance = np.hypot(px - ax - along * dx, py - ay - along * dy) - radius
    return _soft(distance.min(axis=1))


def _grid(size_px: int) -> Grid:
    line = (np.arange(size_px, dtype=np.float32) + 0.5) / size_px
    px, py = np.meshgrid(line, line)
    return px, py


def _soft(distance: np.ndarray) -> Float[np.ndarray, "t h w"]:
    """Cover from the signed distance to an edge."""
    return np.clip(0.5 - distance / EDGE, 0, 1).astype(np.float32)
