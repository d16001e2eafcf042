"""The clips of a run: their weights, and the log of how often each activity is drawn."""

import logging
import re
from dataclasses import replace

import pytest

from tests.support.stores import build_store
from wanlora.commands.train.data import Data
from wanlora.commands.train.start_log import log_draws
from wanlora.config import TrainConfig, load
from wanlora.core.buckets import Bucket
from wanlora.errors import ConfigError
from wanlora.store.reader import StoreReader
from wanlora.training.batch_sizes import BatchSize
from wanlora.training.cached_clips import weighted
from wanlora.training.source import make_source
from wanlora.wan.variants import VARIANTS

BUCKETS = (Bucket(17, 64, 64), Bucket(1, 64, 64))


def data_of(folder, clips, view, **order):
    sizes = {
        bucket: BatchSize(8 if bucket.num_frames == 1 else 1, 1)
        for bucket in {clip.bucket for clip in clips}
    }
    source = make_source(
        view, StoreReader.of_view(folder, view), clips, VARIANTS["micro"], seed=0,
        sampler="uniform", shift=None,
        batch_size={bucket: size.global_batch for bucket, size in sizes.items()}, **order,
    )  # fmt: skip
    return Data(folder, view, clips, (), sizes, source, (), usual_shift=3.0)


def test_weights_of_clips_and_activities_multiply_and_are_drawn(tmp_path):
    view = build_store(tmp_path, num_clips=4)
    walking, *others = view.clips
    clips = weighted((replace(walking, weight=3.0), *others), {"walking": 2.0})
    assert [(clip.activity, clip.weight) for clip in clips] == [
        ("walking", 6.0), ("running", 1.0), ("walking", 2.0), ("running", 1.0),
    ]  # fmt: skip
    order = data_of(tmp_path, clips, view).source.order
    assert order.steps_per_epoch == 10
    drawn = [order.batch(step).indices[0] for step in range(10)]
    assert [drawn.count(index) for index in range(4)] == [6, 1, 2, 1]


@pytest.mark.parametrize(
    ("variant", "shift"), [("t2v-14b", 5.0), ("t2v-a14b", 12.0), ("micro", 3.0)]
)
def test_the_shift_is_the_variants_for_the_size_of_most_clips(tmp_path, variant, shift):
    view = build_store(tmp_path, num_clips=3, buckets=(Bucket(1, 720, 1280), Bucket(1, 64, 64)))
    reader = StoreReader.of_view(tmp_path, view)

    def source(clips, chosen=None):
        return make_source(
            view, reader, clips, VARIANTS[variant], seed=0, sampler="uniform", shift=chosen
        )

    assert [clip.bucket.height for clip in view.clips] == [720, 64, 720]
    assert source(view.clips).shift == shift
    assert source(view.clips[1:2]).shift == VARIANTS[variant].defaults.shift
    assert source(view.clips, chosen=2.5).shift == 2.5


@pytest.mark.parametrize(("name", "fact"), [("dancing", "running, walking"), ("walking", "1000")])
def test_a_weight_of_no_activity_or_out_of_range_is_refused(tmp_path, name, fact):
    clips = build_store(tmp_path, num_clips=4).clips
    with pytest.raises(ConfigError, match=rf"clip_weights\.{name}.*{fact}"):
        weighted(clips, {name: 5000.0})


def test_shares_and_buckets_without_a_step_are_logged_before_a_run(tmp_path, caplog):
    view = build_store(tmp_path, num_clips=4, buckets=BUCKETS)  # walking clips, running images
    data = data_of(tmp_path, weighted(view.clips, {"walking": 4.0}), view)
    with caplog.at_level(logging.INFO):
        log_draws(data, balance_activities=False, end_step=6)
    shares, untrained = caplog.records
    assert "walking 80 %, running 20 %" in shares.getMessage()
    assert untrained.levelno == logging.WARNING
    assert "1x64x64" in untrained.getMessage()
    assert re.search(r"\b8 clips, .* 2", untrained.getMessage())


def test_an_activity_is_named_in_a_setting_as_it_is_written():
    config = load(TrainConfig, sets=["clip_weights.jumping-jacks=2", "clip_weights.a.b c=0.5"])
    assert config.clip_weights == {"jumping-jacks": 2.0, "a.b c": 0.5}
    for bad in ("clip_weights.walk=0", "clip_weights.walk=-1", "clip_weights.walk=nan"):
        with pytest.raises(ConfigError, match=r"clip_weights\.walk"):
            load(TrainConfig, sets=[bad])


def test_activities_cannot_be_balanced_and_weighted_at_once():
    with pytest.raises(ConfigError, match=r"balance_activities.*clip_weights"):
        load(TrainConfig, sets=["balance_activities=true", "clip_weights.walking=2"])
