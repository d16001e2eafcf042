"""`wanlora sample` of a model with two transformers: against plain diffusers, and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support import cli
from tests.support.experts import pair_folder
from tests.support.models import random_tensors
from wanlora.adapters.attach import attach_by_expert, scaled
from wanlora.adapters.file import LoraShape, save_adapter
from wanlora.adapters.header import ADAPTER_FILE
from wanlora.adapters.lora import add_adapter
from wanlora.wan import pipeline as wan
from wanlora.wan.denoise import LowNoiseExpert, denoise
from wanlora.wan.transformer import load_transformer

CPU = torch.device("cpu")
PROMPT = "a red person waving on a white background"
NUM_STEPS = 3  # sigmas 1, 0.86 and 0.6: one step of the high-noise expert, two of the other
SMALL = ("--num-frames", 5, "--height", 32, "--width", 32, "--steps", NUM_STEPS)
SETTINGS = wan.VideoSettings(
    num_frames=5, height=32, width=32, steps=NUM_STEPS, guidance_scale=3.0, guidance_scale_low=2.0,
    negative_prompt="blue",
)  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A model with two transformers in `model`, and the run of each expert in `high` and `low`."""
    folder = tmp_path_factory.mktemp("experts")
    model = pair_folder(folder / "model")
    transformer = load_transformer(model, dtype=torch.float32, device=CPU)
    shape = LoraShape(rank=4, alpha=8.0)
    parameters = add_adapter(transformer, shape, seed=0)
    for seed, expert in enumerate(("high", "low")):
        save_adapter(
            folder / expert, random_tensors(parameters, seed=seed), shape,
            provenance={"model": str(model), "variant": "micro-a14b", "expert": expert},
        )  # fmt: skip
    return folder


def plain(project: Path, experts: tuple[str, ...]) -> WanPipeline:
    """Load the pair and adapters as diffusers' documentation does."""
    pipeline = WanPipeline.from_pretrained(project / "model")
    if "high" in experts:
        pipeline.load_lora_weights(project / "high", adapter_name="x")
    if "low" in experts:
        pipeline.load_lora_weights(project / "low", adapter_name="x", load_into_transformer_2=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(pipeline: WanPipeline, **settings) -> np.ndarray:
    return pipeline(
        PROMPT, num_frames=5, height=32, width=32, num_inference_steps=NUM_STEPS,
        generator=torch.Generator("cpu").manual_seed(0), **settings,
    ).frames[0]  # fmt: skip


def theirs(project: Path, *experts: str) -> np.ndarray:
    images = call(
        plain(project, experts), negative_prompt="blue", guidance_scale=3.0, guidance_scale_2=2.0,
        output_type="pil",
    )  # fmt: skip
    return np.stack([np.asarray(image) for image in images])


def frames_of(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.mark.parametrize("experts", [("high", "low"), ("high",), ("low",)], ids="+".join)
def test_adapters_of_experts_give_plain_diffusers_video(project, experts):
    pipeline = wan.load_pipeline(project / "model", dtype=torch.float32, device=CPU)
    adapters = [scaled(project / expert, 1.0, expert=expert) for expert in experts]
    attach_by_expert(wan.transformers_of(pipeline), adapters)
    adapted = wan.generate(pipeline, PROMPT, SETTINGS, seed=0)
    assert np.array_equal(adapted, theirs(project, *experts))
    with wan.base_alone(pipeline):
        base = wan.generate(pipeline, PROMPT, SETTINGS, seed=0)
    assert np.array_equal(base, theirs(project))
    assert not np.array_equal(adapted, base)


def test_denoising_with_cached_prompts_gives_plain_diffusers_latents(project):
    pipeline = plain(project, ("high", "low"))
    embeds = torch.randn(2, 512, 64, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        prompt_embeds=embeds[:1], negative_prompt_embeds=embeds[1:], num_frames=5, height=32,
        width=32, num_inference_steps=NUM_STEPS, guidance_scale=3.0, guidance_scale_2=2.0,
        generator=torch.Generator("cpu").manual_seed(0), output_type="latent",
    ).frames[0]  # fmt: skip
    for in_turn in (False, True):
        latents = denoise(
            pipeline.transformer, prompt_embeds=embeds[0], negative_embeds=embeds[1],
            shape=(16, 2, 4, 4), steps=NUM_STEPS, guidance_scale=3.0, shift=3.0, seed=0,
            device=CPU, dtype=torch.float32,
            low=LowNoiseExpert(pipeline.transformer_2, 2.0, boundary=0.875, in_turn=in_turn),
        )  # fmt: skip
        assert torch.equal(latents, theirs)


def test_the_command_routes_adapters_by_their_headers_and_records_them(project, tmp_path):
    guidance = ("--guidance-scale", 3, "--guidance-scale-low", 2, "--negative-prompt", "blue")
    done = cli.run(
        "sample", "--adapter", project / "low", "--adapter", f"{project / 'high'}=0.5",
        "--prompt", PROMPT, *SMALL, *guidance, "--set", "format=frames", "--compare",
        "--output-dir", tmp_path, "--json",
    )  # fmt: skip
    result = json.loads(done.stdout)
    files = {expert: str(project / expert / ADAPTER_FILE) for expert in ("high", "low")}
    assert result["model"] == str(project / "model")  # from the headers
    assert result["adapters"] == {files["low"]: 1.0, files["high"]: 0.5}
    assert result["experts"] == {"high": [files["high"]], "low": [files["low"]]}
    assert f"high-noise expert: {files['high']} at 0.5" in done.stderr
    (video,) = map(Path, result["videos"])
    record = json.loads(video.with_suffix(".json").read_text())
    assert [(item["expert"], item["scale"]) for item in record["adapters"]] == [
        ("low", 1.0), ("high", 0.5),
    ]  # fmt: skip
    assert (record["guidance_scale"], record["guidance_scale_low"]) == (3.0, 2.0)
    assert record["shift"] == 3.0
    pixels = frames_of(video)
    assert np.array_equal(pixels[:, 16:, :32], theirs(project))
    pipeline = plain(project, ("high", "low"))
    pipeline.transformer.set_adapters("x", 0.5)
    adapted = call(pipeline, negative_prompt="blue", guidance_scale=3.0, guidance_scale_2=2.0)
    # Another process: the last bit depends on the alignment of small matrices in memory.
    assert np.abs(pixels[:, 16:, 36:] - adapted * 255).max() < 2


def test_files_of_other_tools_are_given_with_the_flag_of_their_expert(project, tmp_path):
    for expert in ("high", "low"):
        save_file(load_file(project / expert / ADAPTER_FILE), tmp_path / f"{expert}.safetensors")
    small = ("--prompt", PROMPT, *SMALL, "--set", "format=frames", "--json")
    videos = []
    for index, adapters in enumerate(
        (
            ("--adapter", project / "high", "--adapter", project / "low"),
            ("--adapter-high", tmp_path / "high.safetensors=2", "--model", project / "model",
             "--adapter-low", tmp_path / "low.safetensors=2"),
        )
    ):  # fmt: skip
        result = cli.invoke("sample", *adapters, *small, "--output-dir", tmp_path / str(index))
        assert result.exit_code == 0, result.output
        videos += json.loads(result.stdout)["videos"]
    first, second = (frames_of(Path(video)) for video in videos)
    assert np.array_equal(first, second)  # alpha 8 of rank 4 is in the header alone: a scale of 2


def refused(project, *words, **options) -> str:
    return cli.refuses("sample", "--prompt", PROMPT, *SMALL, *words, **options)


def test_adapters_that_do_not_fit_the_experts_are_refused_by_name(project, tmp_path):
    model = ("--model", project / "model")
    high, low = (project / expert / ADAPTER_FILE for expert in ("high", "low"))
    message = refused(project, "--adapter-low", high, "--adapter-high", low)
    assert f"--adapter-high {low}" in message
    message = refused(project, "--adapter", high, "--adapter", project / "high")
    assert "2 adapters" in message
    message = refused(project, "--adapter", high, "--model", "micro")
    assert f"--adapter {high}" in message
    assert "one transformer" in message
    plain_file = tmp_path / "plain.safetensors"
    save_file(load_file(high), plain_file)
    message = refused(project, "--adapter", plain_file, *model)
    assert f"--adapter-low {plain_file}" in message
    assert "--model" in refused(project, "--adapter-high", plain_file, exit_code=2)
    message = refused(project, "--adapter-high", plain_file, "--model", "micro")
    assert f"--adapter-high {plain_file}" in message
    both = tmp_path / "both.safetensors"
    of_low = load_file(low)
    second = {key.replace("transformer.", "transformer_2."): of_low[key] for key in of_low}
    save_file(load_file(high) | second, both)
    assert str(both) in refused(project, "--adapter-high", both, *model)
    assert not (tmp_path / "out").exists()


def test_guidance_that_would_have_no_effect_is_refused(project):
    message = refused(project, "--guidance-scale", 1, "--guidance-scale-low", 3, exit_code=2)
    assert "--guidance-scale-low" in message
    message = refused(project, "--model", "micro", "--guidance-scale-low", 3, exit_code=2)
    assert "one transformer" in message
