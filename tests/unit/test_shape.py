"""Figures of the embedded model's card: shape score, clips that match their prompts, minimums."""

import numpy as np
import pytest

from tools.micro import measure, shape
from wanlora.micro import world

SEED = 100
NUM_SEEN = 4
"""Frames of a clip that are scored here."""


@pytest.fixture(autouse=True)
def few_moments(monkeypatch):
    monkeypatch.setattr(shape, "MOMENTS", np.array([0.0, 0.5]))
    yield
    shape._drawn.cache_clear()


def mask(concept, frame=8):
    return world.cover(concept, SEED)[frame] > 0.5


@pytest.mark.parametrize("concept", ["circle", "square", "jumping"])
def test_a_drawn_clip_has_nearly_the_full_score(concept):
    frames = world.draw(concept, SEED).frames[:: world.NUM_FRAMES // NUM_SEEN]
    assert shape.score(frames, concept).min() > 0.95


def test_size_and_position_do_not_matter():
    line = (np.arange(world.SIZE_PX) + 0.5) / world.SIZE_PX
    x, y = np.meshgrid(line, line)
    smaller = np.hypot(x - 0.31, y - 0.64) < 0.15 * 0.92
    assert shape.nearest(smaller, "circle") > 0.96


def test_a_bite_out_of_a_circle_lowers_the_score_by_its_area():
    whole = mask("circle")
    row, column = np.argwhere(whole).mean(axis=0).astype(int)
    bitten = whole.copy()
    bitten[row:, column:] = False  # a quarter
    expected = bitten.sum() / whole.sum()
    assert shape.nearest(bitten, "circle") == pytest.approx(expected, abs=0.05)


def test_a_spot_beside_a_circle_lowers_the_score():
    spotted = mask("circle")
    before = shape.nearest(spotted, "circle")
    spotted[:6, :6] = True
    assert shape.nearest(spotted, "circle") < before - 0.05


def test_another_concept_scores_lower():
    assert shape.nearest(mask("square"), "circle") < 0.9 < shape.nearest(mask("square"), "square")
    assert shape.nearest(mask("jumping"), "circle") < 0.6


def test_an_empty_frame_scores_nothing():
    assert shape.nearest(np.zeros((world.SIZE_PX, world.SIZE_PX), bool), "circle") == 0


def test_the_median_is_over_the_frames_of_all_clips():
    drawn = world.draw("circle", SEED).frames[:3]
    blank = np.full_like(drawn, 128)
    assert measure.shape_score([drawn, drawn, blank], "circle") > 0.9
    assert measure.shape_score([drawn, blank, blank], "circle") == 0


def test_a_class_below_the_bar_is_listed():
    figures = dict.fromkeys(measure.BARS, 1.0) | {"psnr_db": 30.0, "wrong_over_right": 9.0}
    figures["shape"] = {"circle": 0.95, "square": 0.85}
    assert [line.split(":")[0] for line in measure.failures(figures, measure.BARS)] == [
        "shape square"
    ]


def test_the_share_asked_for_and_shown_is_counted_by_word():
    scenes = [world.scene("circle", seed) for seed in range(4)]
    clips = [world.draw("circle", seed).frames for seed in range(4)]
    rates = measure.rate(clips, scenes)
    assert rates == {"concept": 1.0, "colour": 1.0, "background": 1.0, "direction": 1.0}
    swapped = [scene._replace(concept="square") for scene in scenes]
    rates = measure.rate(clips, swapped)
    assert rates["concept"] == 0.0
