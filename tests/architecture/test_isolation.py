"""Stage two never meets the encoders, and help needs no torch."""

import shutil

import pytest
import torch

from tests.support import adapters, cli

FORBIDDEN = (
    "transformers.models.umt5.modeling_umt5",
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "diffusers.pipelines",
    "wanlora.wan.encoders",
    "wanlora.wan.identity",
    "wanlora.wan.pipeline",
    "wanlora.adapters.reread",
    "wanlora.media",
    "wanlora.data.clip_frames",
    "av",
)


def test_a_training_process_imports_no_encoder_and_needs_only_the_transformer(
    micro_folder, cache_fp16, tmp_path
):
    model = tmp_path / "only-the-transformer"
    shutil.copytree(micro_folder / "transformer", model / "transformer")
    theirs = {
        f"diffusion_model.{adapters.original(module)}.{name}.weight": torch.zeros(shape)
        for module in adapters.modules(["blocks.N.attn1.to_q"], blocks=5)
        for name, shape in (("lora_A", (2, 128)), ("lora_B", (128, 2)))
    }
    cache = shutil.copytree(cache_fp16, tmp_path / "cache")
    modules = cli.modules_after(
        "train", "--cache", cache, "--output-dir", tmp_path / "run", "--max-steps", 2,
        "--model", model, "--device", "cpu", "--set", "lora.rank=2",
        "--preview-prompt", "a prompt that is encoded by another process",
        "--set", "previews.steps=1",
        "--set", r"lora.targets=blocks\.\d+\.attn1\.to_q",
        "--init-adapter", adapters.write(tmp_path / "comfyui.safetensors", theirs),
    )  # fmt: skip
    assert "diffusers.models.transformers.transformer_wan" in modules
    assert not modules & set(FORBIDDEN)


def test_stage_one_needs_only_the_encoders(micro_folder, npz_manifest, tmp_path):
    model = tmp_path / "only-the-encoders"
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(micro_folder / part, model / part)
    cli.run(
        "cache-latents", "--manifest", npz_manifest, "--cache", tmp_path / "cache",
        "--model", model, "--device", "cpu",
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments", [("--help",), ("train", "--help"), ("sample", "--help"), ("config", "train")]
)
def test_help_imports_neither_torch_nor_diffusers(arguments):
    modules = cli.modules_after(*arguments)
    assert not modules & {"torch", "diffusers", "transformers", "peft", "zarr", "numpy", "av"}
