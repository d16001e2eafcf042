"""Resizing against the definition of a bicubic filter with antialias, written out in numpy."""

from fractions import Fraction

import numpy as np
import pytest

from wanlora.core.aspect import cover_size
from wanlora.media import transform


def cubic(x, a=-0.5):
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def weights(size, new_size):
    """Rows: output pixels; the filter is stretched by the scale when shrinking."""
    scale = size / new_size
    stretch = max(1.0, scale)
    centers = (np.arange(new_size) + 0.5) * scale
    matrix = cubic((np.arange(size) + 0.5 - centers[:, None]) / stretch)
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(64, 96), (200, 150), (33, 250)])
def test_cover_and_centre_crop_follow_the_definition(size):
    # Values from the middle: the overshoot of the first pass is cut off at 0 and 255 otherwise.
    frames = np.random.default_rng(0).integers(80, 176, (1, *size, 3), dtype=np.uint8)
    found = transform.resize_and_crop(frames, height=48, width=80).permute(0, 2, 3, 1).numpy()
    height, width = cover_size(*size, height=48, width=80)
    rows, columns = weights(size[0], height), weights(size[1], width)
    resized = np.moveaxis(rows @ np.moveaxis(frames / 1.0, 3, 1) @ columns.T, 1, 3)
    top, left = (height - 48) // 2, (width - 80) // 2
    wanted = resized[:, top : top + 48, left : left + 80].clip(0, 255)
    # uint8 between the two passes rounds twice.
    assert np.abs(found - wanted).max() <= 2.0
    assert np.abs(found - wanted).mean() < 0.5


def test_the_same_size_is_untouched():
    frames = np.random.default_rng(0).integers(0, 256, (1, 48, 80, 3), dtype=np.uint8)
    found = transform.resize_and_crop(frames, height=48, width=80)
    assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), frames)


def test_fine_texture_does_not_alias():
    checks = np.indices((512, 512)).sum(0) % 2 * 255
    frames = np.repeat(checks[None, :, :, None], 3, axis=3).astype(np.uint8)
    found = transform.resize_and_crop(frames, height=112, width=112).float()
    assert float(found[:, :, 8:-8, 8:-8].std()) < 3


@pytest.mark.parametrize(
    ("frame", "aspect", "wanted"),
    [
        ((480, 832), 1, (480, 832)),
        ((720, 1280), 1, (480, 853)),
        ((1920, 1080), 1, (1479, 832)),
        ((144, 176), Fraction(128, 117), (622, 832)),
        ((576, 720), Fraction(64, 45), (480, 853)),
    ],
)
def test_the_cover_keeps_displayed_proportions(frame, aspect, wanted):
    found = cover_size(*frame, height=480, width=832, sample_aspect=Fraction(aspect))
    assert found == wanted


def test_a_circle_in_wide_pixels_becomes_round():
    y, x = np.indices((180, 180))
    inside = ((x - 89.5) * 2) ** 2 + (y - 89.5) ** 2 < 60**2  # pixels twice as wide as high
    frames = np.repeat((inside * 255).astype(np.uint8)[None, :, :, None], 3, axis=3)
    found = transform.resize_and_crop(frames, height=160, width=160, sample_aspect=Fraction(2))
    disc = found[0, 0].numpy() > 127
    assert abs(int(disc.any(0).sum()) - int(disc.any(1).sum())) <= 2
