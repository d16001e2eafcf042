"""The GIF writer: its frames, their times, and its palettes."""

import io

import numpy as np
import pytest
from PIL import Image, ImageSequence

from wanlora.report.gif import gif


def opened(data):
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("shared_palette", [False, True])
def test_a_gif_shows_its_frames(shared_palette):
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    frames[0, ..., 0], frames[1, ..., 1], frames[2, ..., 2] = 200, 180, 160
    with opened(gif(frames, fps=4, shared_palette=shared_palette)) as shown:
        for index, frame in enumerate(frames):
            shown.seek(index)
            back = np.asarray(shown.convert("RGB")).astype(int)
            assert np.abs(back - frame).max() <= 8


def noise(count):
    return np.random.default_rng(0).integers(0, 256, (count, 16, 24, 3), np.uint8)


@pytest.mark.parametrize(("fps", "count"), [(16, 81), (8, 17), (3.75, 21)])
def test_the_length_is_that_of_the_video_although_a_gif_counts_in_10_ms(fps, count):
    with opened(gif(noise(count), fps=fps)) as shown:
        lasting = [frame.info["duration"] for frame in ImageSequence.Iterator(shown)]
    assert max(lasting) - min(lasting) <= 10
    assert sum(lasting) == pytest.approx(1000 * count / fps, abs=5)


def test_it_repeats_carries_its_comment_and_has_no_more_colours_than_asked_for():
    with opened(gif(noise(2), fps=8, colours=64, comment="é")) as shown:
        assert (shown.info["loop"], shown.info["comment"].decode()) == (0, "é")
        pixels = np.asarray(shown.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) <= 64
