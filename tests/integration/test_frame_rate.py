"""Clips prepared at 24 fps are played at 24 fps by everything that plays frames."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import av
import pytest
from PIL import Image

from tests.support import adapters, cli
from wanlora.adapters.attach import read_scaled
from wanlora.adapters.file import LoraShape, read_adapter, save_adapter
from wanlora.commands.evaluate.setup import open_setup
from wanlora.commands.evaluate.subjects import subjects
from wanlora.commands.evaluate.video_plan import plan, plan_clips
from wanlora.commands.sample.preflight import find_latents, trained_on, video_size
from wanlora.config import EvaluateConfig
from wanlora.runs.saved_latents import read_latents
from wanlora.store.views import read_view, write_view
from wanlora.wan.variants import VARIANTS


@pytest.fixture(scope="module")
def cache(held_out_cache, tmp_path_factory) -> Path:
    """The held-out cache, as `cache-latents` makes it from a manifest of 24 fps."""
    folder = Path(shutil.copytree(held_out_cache, tmp_path_factory.mktemp("fast") / "cache"))
    view = read_view(folder, "default")
    clips = tuple(replace(clip, fps=24.0) for clip in view.clips)
    write_view(folder, "default", replace(view, clips=clips))
    return folder


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory) -> Path:
    """A run of one step, with a preview."""
    folder = tmp_path_factory.mktemp("run") / "run"
    done = cli.invoke(
        "train", "--cache", cache, "--output-dir", folder, "--max-steps", 1, "--set",
        "validation.every=0", "--set", "previews.every=1", "--set", "previews.steps=2",
        "--set", "lora.rank=1", "--set", "optimizer.warmup_steps=0",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder


def frames_per_second(video: Path) -> float:
    with av.open(str(video)) as opened:
        return float(opened.streams.video[0].average_rate)


def test_a_run_records_the_frame_rate_and_size_of_its_clips(run):
    recorded = read_adapter(run).provenance
    assert {name: recorded[name] for name in ("fps", "num_frames", "height", "width")} == {
        "fps": "24", "num_frames": "5", "height": "32", "width": "32",
    }  # fmt: skip


def test_previews_play_at_the_frame_rate_of_the_clips(run, tmp_path):
    latents = find_latents(run)[0]
    assert read_latents(latents).facts["fps"] == "24.0"
    with Image.open(latents.with_suffix(".gif")) as gif:
        assert gif.info["duration"] == pytest.approx(1000 * 4 / 24, abs=10)  # in 1/100 s
    done = cli.invoke("sample", "--latents", latents, "--output-dir", tmp_path)
    assert done.exit_code == 0, done.output
    assert frames_per_second(next(tmp_path.glob("*.mp4"))) == 24


def test_videos_of_an_adapter_have_its_frame_rate_and_size(run, tmp_path):
    given = cli.invoke("sample", "--adapter", run, "--prompt", "a dog", "--fps", "0")
    assert given.exit_code == 2  # a flag, and out of range
    assert "fps" in given.output
    done = cli.invoke(
        "sample", "--adapter", run, "--prompt", "a dog", "--steps", 1, "--guidance-scale", 1,
        "--output-dir", tmp_path,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (video,) = tmp_path.glob("*.mp4")
    assert frames_per_second(video) == 24
    record = json.loads(video.with_suffix(".json").read_text())
    assert [record[name] for name in ("fps", "num_frames", "height", "width")] == [24, 5, 32, 32]


def test_videos_of_an_evaluation_have_the_frame_rate_of_the_held_out_clips(cache, run, tmp_path):
    def fps_of(**values) -> set[float]:
        config = EvaluateConfig(cache=cache, adapter=(str(run),), videos_per_activity=1, **values)
        setup, experts = open_setup(config, read_view(cache, "default"))
        compared = subjects((str(run),), experts, checkpoints=False)
        folders = {"base_dir": tmp_path, "output_dir": tmp_path}
        models = plan(setup, compared, **folders)
        real = plan_clips(setup, output_dir=tmp_path)
        return {video.facts["fps"] for model in [*models, real] for video in model.videos}

    assert fps_of() == {24.0}
    assert fps_of(fps=8.0) == {8.0}


def adapter(folder: Path, **recorded: str) -> str:
    tensors = adapters.tensors_of(adapters.pairs(["blocks.0.attn1.to_q"]))
    save_adapter(folder, tensors, LoraShape(rank=adapters.RANK, alpha=4.0), provenance=recorded)
    return str(folder)


def test_adapters_that_differ_or_recorded_nothing_leave_the_variants_defaults(tmp_path):
    size = {"height": "240", "width": "416"}
    fast = read_scaled(adapter(tmp_path / "a", fps="24", num_frames="33", **size))
    slow = read_scaled(adapter(tmp_path / "b", fps="8", num_frames="33", **size))
    images = read_scaled(adapter(tmp_path / "c", fps="16", num_frames="1", **size))
    old = read_scaled(adapter(tmp_path / "d"))
    damaged = read_scaled(adapter(tmp_path / "e", fps="nan", num_frames="many"))
    rates = [
        trained_on([item.adapter.provenance for item in each], "fps")
        for each in ([fast], [fast, slow], [fast, old], [damaged], [])
    ]
    assert rates == [24.0, None, None, None, None]

    def size_of(*found, **values) -> tuple[int, int, int]:
        recorded = [item.adapter.provenance for item in found]
        return video_size(VARIANTS["t2v-1.3b"], recorded, **values)

    assert size_of(fast) == size_of(fast, slow) == (33, 240, 416)
    assert size_of(fast, num_frames=17) == (17, 240, 416)
    assert size_of(images) == size_of(fast, old) == size_of(damaged) == size_of() == (81, 480, 832)
