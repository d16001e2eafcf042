"""Clips of the drawn world whose first frame does not show what happens next.

Owns: the clips and the prompts of the embedded image-to-video model.
Dimensions: t frames, y and x pixels.

In the world's own clips the first frame shows where a shape goes: one that moves left starts on the
right. Half of the shapes therefore start nearer to the middle, so that the prompt decides. A
quarter of the prompts do not name colours, so that the image decides those.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from wanlora.core.rng import Stream, generator
from wanlora.micro import world


class Example(NamedTuple):
    """A clip, its prompt and the scene it shows."""

    frames: UInt8[np.ndarray, "t y x 3"]
    prompt: str
    scene: world.Scene


def example(concept: str, seed: int) -> Example:
    """Draw the training clip of (concept, seed)."""
    draws = generator(seed, Stream.WORLD, len(world.CONCEPTS) + world.CONCEPTS.index(concept))
    scene = world.scene(concept, seed)
    share = draws.random() if draws.random() < 0.5 else 0.0
    cover = nearer(world.cover(concept, seed), scene.direction, share)
    prompt = short_prompt(scene) if draws.random() < 0.25 else scene.caption
    return Example(world.paint(cover, scene), prompt, scene)


def nearer(
    cover: Float[np.ndarray, "t y x"], direction: str | None, share: float
) -> Float[np.ndarray, "t y x"]:
    """Shift a shape's clip so that it starts nearer to the middle; a person stays.

    Args:
        cover: Cover of a clip of the world; a shape travels through the middle of the picture.
        direction: Direction of a shape; None for a person.
        share: 0 for the clip as it is, 1 for a start in the middle of the picture.
    """
    if direction is None:
        return cover
    step_x, step_y = world.DIRECTIONS[direction]
    shift = round(0.18 * share * world.SIZE_PX)
    return _shifted(_shifted(cover, 2, step_x * shift), 1, step_y * shift)


def _shifted(cover: np.ndarray, axis: int, shift: int) -> np.ndarray:
    """Move a clip along an axis; what leaves the picture is gone, what enters is background."""
    moved = np.roll(cover, shift, axis=axis)
    size = cover.shape[axis]
    gone = np.arange(size) < shift if shift > 0 else np.arange(size) >= size + shift
    mask = np.expand_dims(gone, tuple(other for other in range(3) if other != axis))
    return np.where(mask, np.float32(0), moved)


def short_prompt(scene: world.Scene) -> str:
    """Caption of a scene without its colours, for example `a circle moving left`."""
    if scene.direction is None:
        return f"a person {scene.concept}"
    thing = "striped square" if scene.concept == "striped" else scene.concept
    return f"a {thing} moving {scene.direction}"
