"""Measures of videos, against videos whose measure is known and against scipy."""

import numpy as np
import pytest
from scipy import ndimage

from wanlora.media.quality import consistency, diversity, luma, motion, sharpness, shrink


def noise(num_frames=6, size=48, seed=0):
    random = np.random.default_rng(seed)
    return random.random((num_frames, size, size), dtype=np.float32)


def frozen(num_frames=6):
    return np.repeat(noise(1), num_frames, axis=0)


def flickering(num_frames=6):
    """One picture, dark and bright by turns."""
    picture = 0.2 + 0.3 * noise(1)
    return np.concatenate([picture + 0.3 * (index % 2) for index in range(num_frames)])


def test_luma_is_in_unit_range_and_weighs_the_channels():
    frames = np.zeros((1, 1, 4, 3), np.uint8)
    frames[0, 0, 0], frames[0, 0, 1], frames[0, 0, 2, 1] = 255, (255, 0, 0), 255
    assert luma(frames)[0, 0] == pytest.approx([1, 0.2126, 0.7152, 0], abs=1e-6)


def test_a_frozen_clip_has_no_motion_and_is_wholly_consistent():
    assert motion(frozen()) == 0
    assert consistency(frozen()) == pytest.approx(1)
    assert motion(frozen(1)) == 0
    assert consistency(frozen(1)) == 1


def test_noise_moves_by_a_third_and_foretells_nothing():
    assert motion(noise()) == pytest.approx(1 / 3, abs=0.01)  # E|a - b| of two uniform draws
    assert consistency(noise()) == pytest.approx(0, abs=0.05)


def test_a_flicker_is_motion_but_not_inconsistent_as_long_as_the_picture_stays():
    assert motion(flickering()) == pytest.approx(0.3, abs=1e-6)
    assert consistency(flickering()) == pytest.approx(1)


def test_consistency_is_numpys_correlation_also_of_flat_frames():
    video = noise(2)
    expected = np.corrcoef(video[0].ravel(), video[1].ravel())[0, 1]
    assert consistency(video) == pytest.approx(expected, abs=1e-6)
    flat = np.full((1, 8, 8), 0.5, np.float32)
    assert consistency(np.concatenate([flat, flat / 2])) == 1
    assert consistency(np.concatenate([flat, noise(1, 8)])) == 0


def test_sharpness_is_the_spread_of_scipys_laplacian_and_falls_with_blur():
    video = noise(2)
    inside = [ndimage.laplace(frame.astype(np.float64))[1:-1, 1:-1].std() for frame in video]
    assert sharpness(video) == pytest.approx(np.mean(inside), rel=1e-5)
    blurred = np.stack([ndimage.gaussian_filter(frame, 2) for frame in video])
    assert sharpness(blurred) < 0.1 * sharpness(video)
    assert sharpness(np.full((2, 16, 16), 0.3, np.float32)) == pytest.approx(0, abs=1e-6)


def test_shrinking_is_the_mean_of_blocks():
    video = noise(1, 20)
    assert shrink(video).shape == (1, 2, 2)
    assert shrink(video)[0, 1, 1] == pytest.approx(video[0, 8:16, 8:16].mean())


def test_videos_that_are_all_the_same_have_no_diversity():
    dark, bright = np.zeros((2, 8, 8), np.float32), np.ones((2, 8, 8), np.float32)
    assert diversity([dark, dark, dark]) == 0
    assert diversity([dark, bright]) == 1
    assert diversity([dark, dark, bright]) == pytest.approx(2 / 3)
    assert diversity([dark]) is None
