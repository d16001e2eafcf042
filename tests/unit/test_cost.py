"""Predictions are sums of parts that were counted elsewhere."""

import pytest

from tests.unit.test_memory import work_of
from wanlora.core.buckets import Bucket
from wanlora.cost.gpus import GPUS
from wanlora.cost.seconds import encode_seconds, floor_seconds, model_flops, predict_seconds
from wanlora.cost.sizes import cache_bytes

H100 = GPUS["H100"]


def test_the_floor_of_an_h100_is_that_of_the_published_rates():
    """870 TF at cuDNN's 595 and 516 TFLOP/s and 790 of cuBLAS: 1.52 s; full checkpoints 1.97."""
    work = work_of()
    assert model_flops(work) == pytest.approx(870.2e12, rel=1e-3)
    assert floor_seconds(work, H100) == pytest.approx(1.52, abs=0.01)
    full = predict_seconds(work, ("full",) * 30, H100)
    assert full.attention + full.matmul == pytest.approx(1.97, abs=0.01)


def test_every_way_costs_more_than_the_one_that_keeps_more():
    seconds = [
        predict_seconds(work_of(), (way,) * 30, H100).total for way in ("none", "selective", "full")
    ]
    assert seconds == sorted(seconds)
    mixed = predict_seconds(work_of(), ("selective",) * 10 + ("none",) * 20, H100).total
    assert seconds[0] < mixed < seconds[1]
    eager = predict_seconds(work_of(compiled=False), ("none",) * 30, H100).total
    assert eager > seconds[0]


def test_a_batch_takes_as_long_as_its_clips():
    one, two = (predict_seconds(work_of(batch_size=n), ("none",) * 30, H100).total for n in (1, 2))
    assert two == pytest.approx(2 * one)


def test_stage_one_takes_what_a_clip_has_of_pixels():
    full = encode_seconds(81, 480, 832, H100)
    assert full == pytest.approx(1.5, abs=0.05)
    assert encode_seconds(41, 480, 832, H100) == pytest.approx(full * 41 / 81, rel=0.01)


def test_a_clip_of_a_cache_takes_what_was_measured():
    clip, caption = {Bucket(81, 480, 832): 1}, 130
    assert cache_bytes(clip, caption) == pytest.approx(4.81e6, rel=1e-3)
    assert cache_bytes({Bucket(81, 480, 832): 3}, 3 * caption) == 3 * cache_bytes(clip, caption)
    assert cache_bytes(clip, caption, item_bytes=4) == 2 * cache_bytes(clip, caption)
