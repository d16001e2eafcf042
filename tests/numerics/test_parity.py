"""Stage one and stage two together do what a plain one-stage loop does.

The reference below is written from the papers and the libraries alone: it decodes, encodes, mixes,
predicts and updates in one process, step by step, and shares with the package only the first
values of the adapter.
"""

import functools
import html
import json
import math
import re
from pathlib import Path
from statistics import NormalDist

import ftfy
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, UMT5EncoderModel

from tests.support import cli
from tests.support.experts import pair_folder
from tests.support.i2v import i2v_folder
from wanlora.adapters.file import LoraShape
from wanlora.adapters.lora import add_adapter, initial_values

STEPS, ACCUMULATION, RATE, WARMUP, SEED = 12, 2, 1e-3, 4, 11


def _encode_frames(vae, npz: Path):
    frames = np.load(npz)["frames"]
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1.0
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        return (vae.encode(pixels[None]).latent_dist.mode() - mean) / std


def _encode_condition(vae, npz: Path):
    """Mask and latents of the first frame followed by frames of value 0: 4 + 16 channels.

    Multiplied by 1 / std, as diffusers' image-to-video pipeline does, and not divided by std.
    """
    frames = np.load(npz)["frames"]
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1.0
    pixels[:, 1:] = 0.0
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        latents = (vae.encode(pixels[None]).latent_dist.mode() - mean) * (1.0 / std)
    mask = torch.zeros(1, 4, *latents.shape[2:])
    mask[:, :, 0] = 1.0
    return torch.cat([mask, latents], dim=1)


def _encode_image(processor, encoder, npz: Path):
    """CLIP's last hidden states but one of the first frame."""
    pixels = processor(images=Image.fromarray(np.load(npz)["frames"][0]), return_tensors="pt")
    with torch.no_grad():
        return encoder(**pixels, output_hidden_states=True).hidden_states[-2]


def _encode_prompt(tokenizer, encoder, text: str):
    cleaned = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    cleaned = re.sub(r"\s+", " ", cleaned).strip()
    tokens = tokenizer(
        [cleaned], padding="max_length", max_length=512, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    length = int(tokens.attention_mask.sum())
    embeds = torch.zeros_like(states)
    embeds[:, :length] = states[:, :length]
    return embeds


def _draws(stream: int, step: int, slot: int):
    return np.random.Generator(np.random.Philox(key=[SEED, stream], counter=[0, 0, step, slot]))


def one_stage(
    folder: Path,
    manifest: Path,
    dtype: torch.dtype,
    subfolder="transformer",
    quantiles=(0.0, 1.0),
    num_steps=STEPS,
):
    """Train as the usual loop does: all encoders again for every clip at every step."""
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(folder, subfolder="text_encoder").eval()
    dit = WanTransformer3DModel.from_pretrained(folder, subfolder=subfolder, dtype=dtype)
    dit.eval().requires_grad_(requires_grad=False)
    if dit.config.image_dim:
        processor = CLIPImageProcessor.from_pretrained(folder / "image_processor")
        clip_encoder = CLIPVisionModel.from_pretrained(folder / "image_encoder").eval()
    shape = LoraShape(rank=4, alpha=8)
    adapted = add_adapter(dit, shape, seed=SEED)
    first = initial_values(adapted, SEED)
    masters = {name: first[name].clone().requires_grad_() for name in adapted}
    with torch.no_grad():
        for name, parameter in adapted.items():
            parameter.copy_(masters[name])
    optimizer = torch.optim.AdamW(masters.values(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)

    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    num_clips, batch = len(lines), ACCUMULATION
    losses = []
    for step in range(num_steps):
        slot_losses = []
        for slot in range(batch):
            position = step * batch + slot
            order = _draws(4, position // num_clips, 1).permutation(num_clips)
            line = lines[order[position % num_clips]]
            x0 = _encode_frames(vae, manifest.parent / line["npz"])
            embeds = _encode_prompt(tokenizer, encoder, line["prompt"])

            first_u, last_u = quantiles
            u = first_u + (last_u - first_u) * _draws(1, step, slot).random()
            t = 1 / (1 + math.exp(-NormalDist().inv_cdf(u)))
            s = torch.tensor(3 * t / (1 + 2 * t), dtype=torch.float32)
            noise = torch.from_numpy(
                _draws(0, step, slot).standard_normal(tuple(x0.shape[1:]), dtype=np.float32)
            )[None]
            noisy = (1 - s) * x0 + s * noise
            image = None
            if dit.config.in_channels == 36:
                noisy = torch.cat([noisy, _encode_condition(vae, manifest.parent / line["npz"])], 1)
            if dit.config.image_dim:
                image = _encode_image(processor, clip_encoder, manifest.parent / line["npz"])
                image = image.to(dtype)
            velocity = dit(
                noisy.to(dtype), (1000 * s)[None], embeds.to(dtype), image, return_dict=False
            )[0]
            loss = ((velocity.float() - (noise - x0)) ** 2).mean()
            (loss / batch).backward()
            for name, parameter in adapted.items():
                gradient = parameter.grad.float()
                held = masters[name].grad
                masters[name].grad = gradient if held is None else held + gradient
                parameter.grad = None
            slot_losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / (WARMUP + 1))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in adapted.items():
                parameter.copy_(masters[name])
        losses.append(float(np.mean(slot_losses)))
    return losses, {name: master.detach() for name, master in masters.items()}


def two_stage(cache: Path, run_dir: Path, dtype: str, *more: object, num_steps=STEPS):
    cli.run(
        "train", "--cache", cache, "--output-dir", run_dir, "--max-steps", num_steps,
        "--seed", SEED,
        "--gradient-accumulation-steps", ACCUMULATION, "--learning-rate", RATE,
        "--set", f"optimizer.warmup_steps={WARMUP}", "--set", "lora.rank=4",
        "--set", "lora.alpha=8", "--set", f"dtype={dtype}", *more,
    )  # fmt: skip
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    tensors = safetensors.torch.load_file(run_dir / "pytorch_lora_weights.safetensors")
    return [row["loss"] for row in rows], {
        name.removeprefix("transformer."): tensor for name, tensor in tensors.items()
    }


@pytest.fixture(scope="module")
def trained_in_one_stage(micro_folder, npz_manifest):
    """Losses and masters, by type."""
    return functools.cache(
        lambda dtype: one_stage(micro_folder, npz_manifest, getattr(torch, dtype))
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_training_equals_one_stage_training_bit_for_bit(
    trained_in_one_stage, cache_fp32, tmp_path, dtype
):
    expected, masters = trained_in_one_stage(dtype)
    losses, tensors = two_stage(cache_fp32, tmp_path / "run", dtype)
    assert losses == expected
    assert tensors.keys() == masters.keys()
    for name, master in masters.items():
        assert torch.equal(tensors[name], master), name


# P(sigma < 0.875): the shift of 3 moves 0.7 to 0.875, and logit-normal is Phi(logit(0.7)) there.
SHARE_BELOW = NormalDist().cdf(math.log(0.7 / 0.3))


@pytest.mark.parametrize(
    ("expert", "subfolder", "quantiles"),
    [("high", "transformer", (SHARE_BELOW, 1.0)), ("low", "transformer_2", (0.0, SHARE_BELOW))],
)
def test_each_expert_trains_on_its_range_as_a_plain_loop_does(
    cache_fp32, npz_manifest, tmp_path, expert, subfolder, quantiles
):
    pair = pair_folder(tmp_path / "pair")
    expected, masters = one_stage(pair, npz_manifest, torch.float32, subfolder, quantiles)
    options = ("--model", pair, "--expert", expert, "--device", "cpu")
    losses, tensors = two_stage(cache_fp32, tmp_path / "run", "float32", *options)
    assert losses == expected
    for name, master in masters.items():
        assert torch.equal(tensors[name], master), name


# P(sigma < 0.9) in the same way: 0.9 is 0.75 before the shift.
SHARE_BELOW_900 = NormalDist().cdf(math.log(0.75 / 0.25))


@pytest.mark.parametrize(
    ("options", "more", "subfolder", "quantiles"),
    [
        ({"clip": True}, (), "transformer", (0.0, 1.0)),
        ({"clip": False, "experts": True}, ("--expert", "low"), "transformer_2",
         (0.0, SHARE_BELOW_900)),
    ],
    ids=["with CLIP", "low-noise expert"],
)  # fmt: skip
def test_an_image_to_video_model_trains_as_a_plain_loop_does(
    npz_manifest, tmp_path, micro_home, options, more, subfolder, quantiles
):
    model, cache = i2v_folder(tmp_path / "model", **options), tmp_path / "cache"
    cli.run(
        "cache-latents", "--manifest", npz_manifest, "--cache", cache, "--model", model,
        "--device", "cpu", "--set", "store.dtype=float32", "--set", "text_dtype=float32",
    )  # fmt: skip
    expected, masters = one_stage(
        model, npz_manifest, torch.float32, subfolder, quantiles, num_steps=4
    )
    losses, tensors = two_stage(cache, tmp_path / "run", "float32", *more, num_steps=4)
    assert losses == expected
    assert tensors.keys() == masters.keys()
    assert options["clip"] == any("add_k_proj" in name for name in masters)
    for name, master in masters.items():
        assert torch.equal(tensors[name], master), name


def test_the_default_float16_cache_stays_within_its_rounding(
    trained_in_one_stage, cache_fp16, tmp_path
):
    expected, _ = trained_in_one_stage("float32")
    losses, _ = two_stage(cache_fp16, tmp_path / "run", "float32")
    assert losses[0] == pytest.approx(expected[0], rel=1e-4)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses != expected
