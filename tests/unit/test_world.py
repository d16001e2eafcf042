"""The drawn world: a clip is a function of its concept and seed, and moves."""

import numpy as np
import pytest

from wanlora.micro import world


def test_a_clip_is_a_function_of_its_concept_and_seed():
    first, again, other = (world.draw("waving", seed) for seed in (3, 3, 4))
    assert np.array_equal(first.frames, again.frames)
    assert first.scene == again.scene == world.scene("waving", 3)
    assert not np.array_equal(first.frames, other.frames)


@pytest.mark.parametrize(
    ("concept", "words"),
    [
        ("circle", "a {colour} circle moving {direction} on a {background} background"),
        ("striped", "a striped {colour} square moving {direction} on a {background} background"),
        ("walking", "a {colour} person walking on a {background} background"),
    ],
)
def test_captions_say_all_that_differs_between_clips(concept, words):
    scene = world.scene(concept, 1)
    assert scene.caption == words.format(**scene._asdict())


@pytest.mark.parametrize("concept", world.CONCEPTS)
def test_everything_moves_and_stays_in_the_picture(concept):
    for seed in range(6):
        cover = world.cover(concept, seed)
        assert cover.shape == (world.NUM_FRAMES, world.SIZE_PX, world.SIZE_PX)
        assert np.abs(np.diff(cover, axis=0)).mean(axis=(1, 2)).max() > 0.002
        rim = np.concatenate([cover[:, [0, -1]].ravel(), cover[:, :, [0, -1]].ravel()])
        assert rim.max() < 0.8, concept  # a soft edge may touch it


def test_what_the_model_has_never_seen_is_apart_from_what_it_knows():
    assert not set(world.KNOWN) & set(world.HELD_OUT)
    assert set(world.SHAPES) < set(world.CONCEPTS)


def test_a_larger_picture_shows_the_same():
    small, large = (world.cover("square", 2, size_px=size) for size in (32, 64))
    halved = large.reshape(len(large), 32, 2, 32, 2).mean(axis=(2, 4))
    assert np.abs(small - halved).max() < 0.3
    assert np.abs(small - halved).mean() < 0.01
