"""The forward passes that an estimate counts are those that a run makes."""

import pytest

from tests.support.stores import build_store
from wanlora.commands.estimate.pauses import Passes, preview_passes, validation_passes
from wanlora.config import EstimateConfig, PreviewSettings, TrainConfig, ValidationSettings
from wanlora.core.buckets import Bucket
from wanlora.store.reader import StoreReader
from wanlora.training.panel import num_due
from wanlora.training.source import make_source
from wanlora.training.validation import make_panel
from wanlora.wan.variants import VARIANTS

SMALL, LARGE = Bucket(1, 64, 64), Bucket(17, 64, 64)


@pytest.mark.parametrize(("every", "end_step"), [(0, 100), (500, 499), (500, 1000), (7, 30)])
def test_validations_come_every_so_many_steps_and_after_the_last(every, end_step):
    done = [
        step for step in range(1, end_step + 1) if every and (step % every == 0 or step == end_step)
    ]
    assert num_due(end_step, every=every) == len(done)


def test_the_panels_counted_are_those_that_training_chooses(tmp_path):
    view = build_store(tmp_path, num_clips=30, buckets=(SMALL, LARGE))
    training = [clip for clip in view.clips if clip.split == "train"]
    counted = validation_passes(
        view, {SMALL, LARGE}, splits=("val", "train"), num_clips=5, num_sigmas=8, every=500,
        end_step=1200,
    )  # fmt: skip
    source = make_source(
        view, StoreReader.of_view(tmp_path, view), training, VARIANTS["micro"],
        seed=TrainConfig().seed, sampler="logit_normal", shift=None,
    )  # fmt: skip
    panels = [
        make_panel(
            name,
            [clip for clip in view.clips if clip.split == name],
            source,
            num_clips=5,
            num_sigmas=8,
        )
        for name in ("val", "train")
    ]
    assert counted.groups == tuple(tuple(clip.bucket for clip in panel.clips) for panel in panels)
    assert counted.per_clip == len(panels[0].sigmas)
    # Three validations and the base's losses; one held-out clip and five of training.
    assert (counted.times, counted.total) == (3, 4 * 8 * (1 + 5))


def test_the_defaults_of_estimate_are_those_of_train():
    for name in ("validation", "previews"):
        assert getattr(EstimateConfig(), name) == getattr(TrainConfig(), name)
    settings = ValidationSettings()
    found = validation_passes(
        None, {LARGE}, splits=("val", "train"), num_clips=settings.num_clips,
        num_sigmas=settings.num_sigmas, every=settings.every, end_step=500,
    )  # fmt: skip
    assert found.per_clip * sum(map(len, found.groups)) == 256


def test_processes_share_a_panel_clip_by_clip_and_wait_for_the_slowest():
    panel = (LARGE, SMALL, SMALL, LARGE, SMALL)
    seconds = {SMALL: 1.0, LARGE: 10.0}.__getitem__
    alone = Passes(times=2, once_more=True, groups=(panel, panel), per_clip=3)
    assert alone.seconds(seconds) == 3 * 3 * 2 * 23
    assert alone._replace(num_ranks=2).seconds(seconds) == 3 * 3 * 2 * 12  # 10+1+1, 1+10
    assert alone._replace(num_ranks=2).total == alone.total
    assert alone._replace(times=0).total == 0


def test_previews_take_two_passes_a_denoising_step_with_guidance():
    def counted(**settings) -> Passes:
        return preview_passes(
            [SMALL, LARGE], VARIANTS["t2v-1.3b"], num_prompts=3, denoising_steps=20, **settings
        )

    found = counted(every=100, end_step=250)
    assert (found.times, found.total) == (4, 4 * 3 * 20 * 2)  # steps 0, 100, 200 and 250
    assert set(found.groups[0]) == {LARGE}
    assert len(found.groups[0]) == 3
    assert counted(every=PreviewSettings().period(250), end_step=250).total == 0
    own = PreviewSettings(prompts=("a", "b"))
    assert counted(every=own.period(100), end_step=100).times == 5
