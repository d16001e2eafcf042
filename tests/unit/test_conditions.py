"""Conditions of an image-to-video transformer: rows, dropout, and refusals."""

from dataclasses import replace

import pytest
import torch

from tests.support.stores import build_store, row_of
from wanlora.commands.train.identity import identity_of
from wanlora.config import TrainConfig
from wanlora.core.buckets import Bucket
from wanlora.errors import ConfigError, StaleStoreError
from wanlora.store.reader import StoreReader
from wanlora.training import flow
from wanlora.training.cached_clips import check_encodings
from wanlora.training.predict import predict
from wanlora.training.source import make_source
from wanlora.training.trial import random_batch
from wanlora.training.validation import Panel, losses, panel_facts
from wanlora.wan.variants import VARIANTS

CPU = torch.device("cpu")
ALL_KINDS = VARIANTS["micro-i2v-clip"].kinds
SHORT = Bucket(5, 64, 64)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A cache with rows of all kinds, and its view; clips of 17 frames."""
    cache = tmp_path_factory.mktemp("i2v")
    return cache, build_store(cache, num_clips=4, kinds=ALL_KINDS)


def source_of(stored, name="micro-i2v-clip", clips=None, **settings):
    cache, view = stored
    reader = StoreReader.of_view(cache, view, VARIANTS[name].kinds)
    settings = {"sampler": "uniform", "shift": 3.0, "batch_size": 4} | settings
    return make_source(view, reader, clips or view.clips, VARIANTS[name], seed=7, **settings)


def seen_by(batch) -> dict:
    """Arguments that the transformer is called with."""
    seen = {}

    def transformer(**given):
        seen.update(given)
        return (given["hidden_states"][:, :16],)

    predict(transformer, batch, CPU, torch.float32)
    return seen


def test_a_micro_batch_has_the_rows_of_its_clips(stored):
    batch = source_of(stored).read(0, (0, 1, 2, 3))
    keys = {clip.clip_id: clip.key for clip in stored[1].clips}
    for index, clip_id in enumerate(batch.clip_ids):
        for kind, tensor in (
            ("cond_latents", batch.condition),
            ("clip_vision", batch.image_embeds),
        ):
            expected = torch.from_numpy(row_of(kind, keys[clip_id])).float()
            assert torch.equal(tensor[index], expected)
    assert batch.dropped is None


def test_a_shortened_clip_has_the_first_frames_of_its_condition(stored):
    clips = [replace(clip, bucket=SHORT) for clip in stored[1].clips]
    batch = source_of(stored, clips=clips).read(0, (0, 1))
    whole = source_of(stored)
    assert batch.condition.shape == batch.latents.shape
    assert batch.condition.shape[2] == 2
    by_id = {clip.clip_id: clip for clip in stored[1].clips}
    for found, clip_id in zip(batch.condition, batch.clip_ids, strict=True):
        assert torch.equal(found, whole.condition(by_id[clip_id])[:, :2])


@pytest.mark.parametrize(
    ("name", "has_condition", "reads_image"),
    [("micro", False, False), ("micro-i2v", True, False), ("micro-i2v-clip", True, True)],
)
def test_a_transformer_gets_what_it_reads_and_no_more(stored, name, has_condition, reads_image):
    batch = source_of(stored, name).read(0, (0,))
    seen = seen_by(batch)
    assert seen["hidden_states"].shape[1] == (36 if has_condition else 16)
    assert ("encoder_hidden_states_image" in seen) == reads_image
    assert torch.equal(
        seen["hidden_states"][:, :16], flow.mix(batch.latents, batch.noise, batch.sigmas)
    )
    if has_condition:
        assert torch.equal(seen["hidden_states"][:, 20:], batch.condition)


def test_what_the_transformer_reads_has_its_type_except_the_timestep(stored):
    batch, seen = source_of(stored).read(0, (0,)), {}

    def transformer(**given):
        seen.update(given)
        return (given["hidden_states"][:, :16],)

    predict(transformer, batch, CPU, torch.bfloat16)
    types = {name: value.dtype for name, value in seen.items() if torch.is_tensor(value)}
    assert types.pop("timestep") == torch.float32
    assert set(types.values()) == {torch.bfloat16}
    assert "encoder_hidden_states_image" in types


def test_an_image_to_video_run_has_the_draws_of_a_text_to_video_run(stored):
    runs = [source_of(stored, name).read(3, (0, 1)) for name in ("micro", "micro-i2v-clip")]
    for name in ("latents", "noise", "sigmas", "prompt_embeds"):
        assert torch.equal(*(getattr(run, name) for run in runs))


def test_conditions_are_dropped_as_often_as_set_and_nothing_else_changes(stored):
    rate, slots, steps = 0.3, (0, 1, 2, 3), 400
    dropping, always = (source_of(stored, condition_dropout=p) for p in (rate, 0.0))
    drawn = torch.cat([dropping._dropped(step, slots) for step in range(steps)]).float()
    # Four standard deviations of a binomial.
    assert drawn.mean().item() == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 1600) ** 0.5)
    step = next(s for s in range(steps) if 0 < dropping._dropped(s, slots).sum() < 4)
    batch, other = dropping.read(step, slots), always.read(step, slots)
    for name in ("latents", "noise", "sigmas", "prompt_embeds", "condition", "image_embeds"):
        assert torch.equal(getattr(batch, name), getattr(other, name)), name
    seen, undropped = seen_by(batch), seen_by(other)
    for index, is_dropped in enumerate(batch.dropped):
        given = seen["hidden_states"][index, 16:]
        embeds = seen["encoder_hidden_states_image"][index]
        if is_dropped:
            assert not given.any()
            assert not embeds.any()
        else:
            assert torch.equal(given, undropped["hidden_states"][index, 16:])
            assert torch.equal(embeds, undropped["encoder_hidden_states_image"][index])
    assert torch.equal(seen["hidden_states"][:, :16], undropped["hidden_states"][:, :16])


def test_a_slot_keeps_its_drop_whatever_its_micro_batch_is(stored):
    source = source_of(stored, condition_dropout=0.5)
    together = source.read(5, (0, 1, 2, 3)).dropped
    assert torch.equal(together, torch.cat([source.read(5, (slot,)).dropped for slot in range(4)]))


def test_validation_never_drops_a_condition(stored):
    source = source_of(stored, condition_dropout=1.0)
    clip = stored[1].clips[0]
    seen = []

    def transformer(**given):
        seen.append(given)
        return (given["hidden_states"][:, :16],)

    losses(Panel("val", (clip,), (0.5,)), transformer, source, device=CPU, dtype=torch.float32)
    assert torch.equal(seen[0]["hidden_states"][0, 20:], source.condition(clip))
    assert torch.equal(seen[0]["encoder_hidden_states_image"][0], source.image_embeds(clip))


def test_losses_and_checkpoints_are_of_the_encoders_that_the_transformer_reads(stored):
    view = stored[1]
    t2v = replace(view, encodings={kind: view.encodings[kind] for kind in ("latents", "text")})

    def facts(of, name):
        kinds = VARIANTS[name].kinds
        return panel_facts(of, "base", kinds=kinds, dtype=torch.float32, device=CPU)

    def identity(of, name):
        return identity_of(of, variant=VARIANTS[name], base="base", expert=None)

    assert facts(view, "micro") == facts(t2v, "micro")  # the added kinds change nothing
    assert identity(view, "micro") == identity(t2v, "micro")
    for made in (facts(view, "micro-i2v-clip"), identity(view, "micro-i2v-clip")):
        assert made["cond_latents"] == view.fingerprint("cond_latents")
        assert made["clip_vision"] == view.fingerprint("clip_vision")


def test_a_view_without_conditions_is_refused_with_the_kinds_and_the_command(stored):
    view = stored[1]
    for kinds, lacking in ((("latents", "text"), "cond_latents and clip_vision"),
                           (("latents", "text", "cond_latents"), "lacks clip_vision")):  # fmt: skip
        lesser = replace(view, encodings={kind: view.encodings[kind] for kind in kinds})
        with pytest.raises(StaleStoreError) as caught:
            check_encodings(lesser, VARIANTS["micro-i2v-clip"], encode_again="wanlora COMMAND")
        assert lacking in str(caught.value)
        assert str(caught.value).endswith("wanlora COMMAND")


def test_dropping_a_condition_is_refused_for_a_text_to_video_model():
    config = TrainConfig(condition_dropout=0.1)
    config.check_model(VARIANTS["micro-i2v"])
    with pytest.raises(ConfigError, match=r"condition_dropout 0\.1.*t2v-14b"):
        config.check_model(VARIANTS["t2v-14b"])


@pytest.mark.parametrize("name", ["micro", "i2v-a14b", "micro-i2v-clip"])
def test_a_trial_has_what_the_transformer_reads(name):
    row = VARIANTS[name]
    batch = random_batch(
        SHORT, 2, num_channels=16, text_shape=(512, row.shape.text_dim),
        has_condition=row.is_i2v, image_shape=row.image_shape,
    )  # fmt: skip
    seen = seen_by(batch)
    assert seen["hidden_states"].shape == (2, row.shape.in_channels, 2, 8, 8)
    image = seen.get("encoder_hidden_states_image")
    assert (image is None) == (row.shape.image_dim is None)
    assert image is None or image.shape == (2, 257, row.shape.image_dim)
    plain = random_batch(SHORT, 2, num_channels=16, text_shape=(512, row.shape.text_dim))
    for field in ("latents", "noise", "prompt_embeds"):
        assert torch.equal(getattr(batch, field), getattr(plain, field))
