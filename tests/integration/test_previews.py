"""Previews: the pipeline's latents without the pipeline, and their way to an mp4."""

import json

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from safetensors import safe_open

from tests.support import cli
from tests.support.models import random_tensors
from wanlora.adapters.file import LoraShape
from wanlora.adapters.lora import add_adapter
from wanlora.commands.sample.preflight import find_latents
from wanlora.commands.train.previews import preview, save_previews
from wanlora.core.buckets import Bucket
from wanlora.errors import RunError
from wanlora.media.decode import decode
from wanlora.media.quality import psnr
from wanlora.runs.saved_latents import read_latents
from wanlora.wan.encoders import decode_latents, load_vae
from wanlora.wan.transformer import load_transformer

CPU = torch.device("cpu")
BUCKET = Bucket(9, 32, 48)
FACTS = {"model": "micro", "variant": "micro"}


@pytest.fixture(scope="module")
def transformer(micro_folder):
    """The micro model with an adapter that changes its output, in the modes training leaves."""
    model = load_transformer(micro_folder, dtype=torch.float32, device=CPU)
    parameters = add_adapter(model, LoraShape(rank=2, alpha=2.0, targets="attention"), seed=0)
    with torch.no_grad():
        for name, value in random_tensors(parameters).items():
            parameters[name].copy_(value)
    return model


@pytest.fixture(scope="module")
def embeds():
    return torch.randn(3, 512, 64, generator=torch.Generator().manual_seed(0))


def previews(transformer, embeds, **settings):
    defaults = {"steps": 4, "guidance_scale": 3.0, "dtype": torch.float32}
    return preview(
        transformer, prompt_embeds=embeds[:2], negative_embeds=embeds[2], bucket=BUCKET,
        num_channels=16, shift=3.0, seed=5, device=CPU, **(defaults | settings),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("guidance_scale", "dtype"),
    [(3.0, torch.float32), (1.0, torch.float32), (3.0, torch.bfloat16)],
)
def test_a_preview_is_the_pipelines_video_bit_for_bit(
    micro_folder, transformer, embeds, guidance_scale, dtype
):
    if dtype == torch.bfloat16:
        transformer = load_transformer(micro_folder, dtype=dtype, device=CPU)
    pipeline = WanPipeline.from_pretrained(micro_folder, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    ours = previews(transformer, embeds, guidance_scale=guidance_scale, dtype=dtype)
    for index, latents in enumerate(ours):
        theirs = pipeline(
            prompt_embeds=embeds[index : index + 1], negative_prompt_embeds=embeds[2:],
            num_frames=9, height=32, width=48, num_inference_steps=4,
            guidance_scale=guidance_scale, output_type="latent",
            generator=torch.Generator("cpu").manual_seed(5 + index),
        ).frames[0]  # fmt: skip
        assert torch.equal(latents, theirs)
    assert not torch.equal(*ours)


def test_training_goes_on_as_if_there_had_been_no_preview(transformer, embeds):
    transformer.blocks[0].train()
    parameter = next(p for p in transformer.parameters() if p.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    modes = [module.training for module in transformer.modules()]
    state = torch.get_rng_state()
    first = previews(transformer, embeds, steps=2)
    assert [module.training for module in transformer.modules()] == modes
    assert len(set(modes)) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert parameter.requires_grad
    assert all(map(torch.equal, first, previews(transformer, embeds, steps=2)))
    transformer.disable_adapters()
    base = previews(transformer, embeds, steps=2)
    transformer.enable_adapters()
    assert not torch.equal(first[0], base[0])
    parameter.grad = None


def test_a_stop_keeps_the_previews_that_are_finished(transformer, embeds):
    passed, asked = [], iter([0] * 5 + [15] * 9)
    made = previews(
        transformer, embeds, steps=2, stop=lambda: next(asked), after_each=lambda: passed.append(1)
    )
    assert len(made) == 1
    assert len(passed) == 2  # other processes wait for each of the prompts
    assert torch.equal(made[0], previews(transformer, embeds, steps=2)[0])


def test_previews_are_saved_with_what_they_were_made_from(tmp_path):
    latents = [torch.full((16, 3, 4, 6), torch.nan), torch.randn(16, 3, 4, 6)]
    projection = np.random.default_rng(0).normal(size=(17, 3)) * 0.1
    pictures = save_previews(
        tmp_path, 500, ["a dog", "a cat"], latents, projection, seed=7, fps=16.0, facts=FACTS
    )
    folder = tmp_path / "previews" / "step-000500"
    assert sorted(path.name for path in folder.iterdir()) == ["01.gif", "01.safetensors"]
    with safe_open(folder / "01.safetensors", framework="pt") as opened:
        assert torch.equal(opened.get_tensor("latents"), latents[1])
        header = opened.metadata()
    assert header["format"] == "pt"
    assert (header["wanlora.prompt"], header["wanlora.seed"]) == ("a cat", "8")
    assert (header["wanlora.step"], header["wanlora.model"]) == ("500", "micro")
    # The first one is missing; the second keeps its number, in TensorBoard too.
    assert {index: picture.shape for index, picture in pictures.items()} == {1: (3, 16, 24, 3)}
    with Image.open(folder / "01.gif") as shown:
        assert (shown.size, shown.n_frames, shown.info["duration"]) == ((24, 16), 3, 250)
    assert not list(tmp_path.glob("*.safetensors"))  # the root is for the adapter alone


def test_without_a_projection_only_latents_are_saved(tmp_path):
    shown = save_previews(
        tmp_path, 1, ["a"], [torch.zeros(16, 1, 2, 2)], None, seed=0, fps=16.0, facts=FACTS
    )
    assert shown == {}
    assert [path.suffix for path in find_latents(tmp_path)] == [".safetensors"]


def test_saved_latents_are_decoded_to_the_vaes_video(tmp_path, micro_folder, transformer, embeds):
    run, videos = tmp_path / "run", tmp_path / "videos"
    latents = previews(transformer, embeds, steps=2)
    for step in (1, 2):
        save_previews(run, step, ["a dog", "a cat"], latents, None, seed=5, fps=16.0, facts=FACTS)
    (run / "pytorch_lora_weights.safetensors").write_bytes(b"never read")
    cli.invoke("sample", "--latents", run / "previews" / "step-000002", "--output-dir", videos)
    names = ["step-000002-00-a-dog-seed5.mp4", "step-000002-01-a-cat-seed6.mp4"]
    assert sorted(path.name for path in videos.glob("*.mp4")) == names
    record = json.loads((videos / names[1]).with_suffix(".json").read_text())
    assert (record["prompt"], record["seed"], record["step"]) == ("a cat", 6, "2")
    vae = load_vae(micro_folder, dtype=torch.float32, device=CPU, tf32=True)
    wanted, other = (decode_latents(vae, video[None])[0].numpy() for video in latents)
    found = decode(videos / names[0], start_s=0.0, fps=16.0, num_frames=9)
    assert found.shape == wanted.shape == (9, 32, 48, 3)
    assert psnr(found, wanted) > psnr(found, other) + 5  # mp4 loses some of it: it is noise yet
    everything = cli.invoke("sample", "--latents", run, "--output-dir", tmp_path / "all")
    assert everything.exit_code == 0, everything.output
    assert len(list((tmp_path / "all").glob("*.mp4"))) == 4
    again = cli.refuses("sample", "--latents", run, "--output-dir", tmp_path / "all", exit_code=2)
    assert "--overwrite" in again


def test_latents_of_another_vae_are_refused(tmp_path, micro_home):
    save_previews(
        tmp_path, 1, ["a"], [torch.zeros(16, 1, 2, 2)], None, seed=0, fps=16.0,
        facts={"model": "micro", "variant": "t2v-1.3b"},
    )  # fmt: skip
    said = cli.refuses("sample", "--latents", tmp_path, "--output-dir", tmp_path / "out")
    assert "t2v-1.3b" in said
    assert "--model" in said


def test_sample_needs_prompts_or_latents_and_says_so(tmp_path):
    assert "--prompt" in cli.refuses("sample", exit_code=2)
    assert "--prompt" in cli.refuses("sample", "--prompt", "a", "--latents", tmp_path, exit_code=2)
    said = cli.refuses("sample", "--latents", tmp_path, "--steps", 3, exit_code=2)
    assert "steps" in said
    assert "previews.every" in cli.refuses("sample", "--latents", tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(RunError, match=r"x\.safetensors.*'latents'"):
        read_latents(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(RunError, match="cannot be read"):
        read_latents(tmp_path / "x.safetensors")
