"""The recogniser is right about drawn clips, and does not take a pose for a motion."""

import numpy as np
import pytest

from wanlora.micro import recognise, world

SEEDS = range(100, 104)


@pytest.mark.parametrize("concept", world.CONCEPTS)
def test_a_drawn_clip_is_recognised_in_every_respect(concept):
    for seed in SEEDS:
        frames, scene = world.draw(concept, seed)
        seen = recognise.recognise(frames)
        assert (seen.concept, seen.colour, seen.background) == (
            concept, scene.colour, scene.background,
        )  # fmt: skip
        assert scene.direction in (None, seen.direction)


@pytest.mark.parametrize("concept", world.CONCEPTS)
def test_a_frozen_clip_is_nothing(concept):
    for seed in SEEDS:
        frames = world.draw(concept, seed).frames
        for still in (frames[8], np.rint(frames.mean(axis=0)).astype(np.uint8)):
            seen = recognise.recognise(np.repeat(still[None], world.NUM_FRAMES, axis=0))
            assert seen.concept is None


@pytest.mark.parametrize("concept", world.CONCEPTS)
def test_blur_and_noise_do_not_hide_what_is_shown(concept):
    random = np.random.default_rng(0)
    frames = world.draw(concept, SEEDS[0]).frames.astype(float)
    blurred = (frames + sum(np.roll(frames, by, axis) for by in (-1, 1) for axis in (1, 2))) / 5
    noisy = np.clip(blurred + random.normal(0, 8, frames.shape), 0, 255).astype(np.uint8)
    assert recognise.recognise(noisy).concept == concept


def test_frames_in_another_order_are_another_motion():
    """A walker played in random order is in all the right poses."""
    frames = world.draw("walking", SEEDS[0]).frames
    order = np.random.default_rng(0).permutation(len(frames))
    assert recognise.recognise(frames[order]).concept != "walking"


@pytest.mark.parametrize("frames", ["plain", "noise"])
def test_a_clip_of_nothing_is_nothing(frames):
    shape = (world.NUM_FRAMES, world.SIZE_PX, world.SIZE_PX, 3)
    plain = np.full(shape, 128, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert recognise.recognise({"plain": plain, "noise": noise}[frames]).concept is None
