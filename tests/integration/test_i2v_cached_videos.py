"""Videos from cached first frames: `evaluate`, and previews while training.

The oracle is diffusers' WanImageToVideoPipeline with the clip's own first frame, read from its
file: it encodes the frame again.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from tests.support import cli
from tests.support.i2v import i2v_folder
from tests.support.models import random_tensors
from wanlora.adapters.attach import attach
from wanlora.adapters.file import LoraShape, save_adapter
from wanlora.adapters.lora import add_adapter
from wanlora.commands.evaluate import preflight, videos
from wanlora.commands.evaluate import run as evaluate
from wanlora.commands.evaluate.setup import open_setup
from wanlora.commands.evaluate.subjects import subjects
from wanlora.commands.evaluate.video_plan import plan, plan_clips
from wanlora.config import EvaluateConfig
from wanlora.core.buckets import Bucket
from wanlora.data import manifest
from wanlora.errors import ConfigError
from wanlora.media.decode import decode
from wanlora.media.quality import psnr
from wanlora.media.recorded import read_record
from wanlora.runs.saved_latents import read_latents
from wanlora.store.views import View, read_view
from wanlora.wan.encoders import load_vae
from wanlora.wan.transformer import load_transformer
from wanlora.wan.variants import VARIANTS

CPU = torch.device("cpu")
SIZE = {"num_frames": 5, "height": 32, "width": 32}
QUICK = {"num_sigmas": 1, "steps": 3, "videos_per_activity": 1, "num_clips": 2}


@pytest.fixture(scope="module")
def project(tmp_path_factory, held_out_cache) -> Path:
    """The text-to-video cache with conditions added, in `cache`, and two models with adapters."""
    folder = tmp_path_factory.mktemp("cached-i2v")
    shutil.copytree(held_out_cache, folder / "cache")
    for name, options in (("clip", {"clip": True}), ("experts", {"clip": False, "experts": True})):
        model = i2v_folder(folder / name, **options)
        transformer = load_transformer(model, dtype=torch.float32, device=CPU)
        shape = LoraShape(rank=2, alpha=2.0)
        parameters = add_adapter(transformer, shape, seed=0)
        provenance = {"variant": f"micro-i2v-{'clip' if name == 'clip' else 'a14b'}"}
        provenance |= {} if name == "clip" else {"expert": "high"}
        save_adapter(folder / f"{name}-run", random_tensors(parameters, scale=0.05), shape,
                     provenance=provenance)  # fmt: skip
    done = cli.invoke(
        "cache-latents", "--manifest", held_out_cache.parent / "data", "--cache", folder / "cache",
        "--model", folder / "clip", "--set", "store.dtype=float32", "--set", "text_dtype=float32",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder


def config(project: Path, name: str, folder: Path, **values) -> EvaluateConfig:
    return EvaluateConfig(
        cache=project / "cache", model=str(project / name), output_dir=folder,
        adapter=(str(project / f"{name}-run"),), **(QUICK | values),
    )  # fmt: skip


def first_frame(held_out_cache: Path, clip_id: str) -> Image.Image:
    clips = manifest.read_all([held_out_cache.parent / "data"])
    (path,) = (clip.path for clip in clips if clip.clip_id == clip_id)
    return Image.fromarray(np.load(path)["frames"][0])


@pytest.mark.parametrize("name", ["clip", "experts"])
def test_videos_of_an_evaluation_are_plain_diffusers_from_the_clips_first_frame(
    project, held_out_cache, tmp_path, name
):
    settings = config(project, name, tmp_path, seed=3)
    setup, experts = open_setup(settings, preflight.check(settings))
    compared = subjects(settings.adapter, experts, checkpoints=False)
    models = plan(setup, compared, base_dir=tmp_path, output_dir=tmp_path)
    model = project / name
    loaded = {
        part.expert: load_transformer(
            model, dtype=torch.float32, device=CPU, subfolder=part.subfolder
        )
        for part in setup.variant.transformers
    }
    vae = load_vae(model, dtype=torch.float32, device=CPU, tf32=False)
    theirs = WanImageToVideoPipeline.from_pretrained(model)
    theirs.set_progress_bar_config(disable=True)
    for planned in models:
        for subject in planned.subjects:
            attach(loaded[subject.expert], [subject.scaled])
            theirs.load_lora_weights(str(subject.scaled.adapter.path))
        video = planned.videos[0]
        frames = videos.generate(setup, loaded, vae, video)
        images = theirs(
            first_frame(held_out_cache, video.start.clip_id), video.prompt, **SIZE,
            num_inference_steps=3, guidance_scale=3.0, output_type="pil",
            generator=torch.Generator("cpu").manual_seed(3),
        ).frames[0]  # fmt: skip
        assert np.array_equal(frames, np.stack([np.asarray(image) for image in images]))
    base, adapted = (planned.videos[0] for planned in models)
    assert base.start == adapted.start
    assert base.start.split == "val"


def test_the_report_shows_the_first_frame_that_base_and_adapter_start_from(
    project, held_out_cache, tmp_path
):
    folder = tmp_path / "out"
    evaluate(config(project, "clip", folder))
    found = json.loads((folder / "evaluation.json").read_text())
    rows = found["videos"]["list"]
    assert [row["activity"] for row in rows] == ["clap", "sit", "walk"]
    for row in rows:
        real = decode(Path(row["files"]["real clip"]), start_s=0, fps=16, num_frames=5)
        own = np.asarray(first_frame(held_out_cache, row["first_frame_of"]))
        others = [np.asarray(first_frame(held_out_cache, r["first_frame_of"])) for r in rows]
        assert psnr(real[:1], own[None]) == max(psnr(real[:1], o[None]) for o in others)
        records = [read_record(Path(row["files"][name])) for name in ("base", "clip-run")]
        assert len({record["first_frame"] for record in records}) == 1
        assert records[0]["first_frame_of"] == row["first_frame_of"]
    page = (folder / "report.html").read_text()
    assert page.count("<figcaption>first frame</figcaption>") == 3


def test_a_size_that_no_clip_has_is_refused_and_fewer_frames_are_not(project, tmp_path):
    settings = config(project, "clip", tmp_path, height=48)
    with pytest.raises(ConfigError, match=r"5x48x32.*5x32x32.*--height"):
        preflight.check(settings)
    view = read_view(project / "cache", "default")
    i2v, t2v = VARIANTS["micro-i2v"], VARIANTS["micro"]

    def clips(variant, *size) -> int:
        return len(preflight.clips_to_start_from(view, variant, Bucket(*size), split="val").clips)

    assert clips(t2v, 5, 48, 32) == clips(i2v, 1, 32, 32) == clips(i2v, 5, 32, 32) == 9
    settings = config(project, "clip", tmp_path, num_frames=1)
    setup, _ = open_setup(settings, preflight.check(settings))
    real = plan_clips(setup, output_dir=tmp_path)
    assert real
    assert {tuple(video.facts["size"]) for video in real.videos} == {(1, 32, 32)}


def test_previews_start_from_the_first_frames_of_held_out_clips(project, held_out_cache, tmp_path):
    run = tmp_path / "run"
    done = cli.invoke(
        "train", "--cache", project / "cache", "--model", project / "clip", "--output-dir", run,
        "--max-steps", 1, "--preview-every", 1, "--set", "previews.steps=2", "--rank", 2,
        "--targets", "attention", "--set", "validation.every=0", "--set", "trackers=[]",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    files = sorted((run / "previews" / "step-000000").glob("*.safetensors"))
    pipeline = WanImageToVideoPipeline.from_pretrained(project / "clip")
    pipeline.set_progress_bar_config(disable=True)
    view: View = read_view(project / "cache", "default")
    held_out = {clip.clip_id for clip in view.clips if clip.split == "val"}
    assert len(files) == 2
    for file in files:
        saved = read_latents(file)
        assert saved.facts["first_frame_of"] in held_out
        theirs = pipeline(
            first_frame(held_out_cache, saved.facts["first_frame_of"]), saved.facts["prompt"],
            **SIZE, num_inference_steps=2, guidance_scale=3.0, output_type="latent",
            generator=torch.Generator("cpu").manual_seed(int(saved.facts["seed"])),
        ).frames[0]  # fmt: skip
        assert torch.equal(saved.latents, theirs)
