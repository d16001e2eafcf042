"""Stage one's models: frames to latents (VAE) and prompts to prompt_embeds (UMT5), and back.

Owns: loading both encoders and their exact numerics. Must not be imported by training.
Source: diffusers' WanPipeline (encode_prompt with max_sequence_length 512, and the inverse of its
latent normalisation).

Legend: b clips, c channels, t frames, f latent frames, h w height and width, l tokens, d text_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from diffusers import AutoencoderKLWan
from jaxtyping import Float, Float32, UInt8
from transformers import AutoTokenizer

from wanlora.core.buckets import MAX_TOKENS
from wanlora.core.out_of_memory import is_out_of_memory
from wanlora.core.prompts import clean_prompt
from wanlora.core.text import shorten
from wanlora.errors import MediaError, ModelError
from wanlora.wan.weights import check_loading, hide_bars_without_terminal

Vae: TypeAlias = AutoencoderKLWan
"""The VAE, for annotations of code that does not import diffusers."""

MAX_SEQUENCE_LENGTH = MAX_TOKENS
"""diffusers' name of the maximum number of tokens."""

CLEANING_REVISION = 1
"""Revision of `clean_prompt`, part of the text provenance; increase it with every change."""

_MIN_TRANSFORMERS = (5, 3)


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """UMT5 (transformers' UMT5EncoderModel) and its tokenizer."""

    tokenizer: Any
    model: Any


# --- frames and latents ---


def load_vae(folder: Path, *, dtype: torch.dtype, device: torch.device, tf32: bool) -> Vae:
    """Load the VAE, frozen, without tiling or slicing.

    Args:
        folder: Model folder that holds `vae/`.
        dtype: float32; bfloat16 costs about 1 % accuracy.
        device: Device to compute on.
        tf32: Let cuDNN use TF32 in fp32 convolutions. Sets the process-wide switches; matrix
            products never use TF32.

    Raises:
        ModelError: Weights are missing, left over or of another shape.
    """
    hide_bars_without_terminal()
    try:
        vae, info = AutoencoderKLWan.from_pretrained(
            folder / "vae", dtype=dtype, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"cannot load the VAE in {folder / 'vae'}: {error}") from error
    check_loading(info, folder / "vae")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision("highest")
    return vae.to(device).eval().requires_grad_(requires_grad=False)


def encode_latents(
    vae: Vae,
    frames: UInt8[torch.Tensor, "b 3 t h w"] | Float[torch.Tensor, "b 3 t h w"],
) -> Float32[torch.Tensor, "b c f h_8 w_8"]:
    """Encode frames to normalised latents: (posterior mode - latents_mean) / latents_std.

    One clip at a time, so that the values do not depend on the batch; normalised in fp32.

    Args:
        vae: From `load_vae`.
        frames: uint8, or float in [-1, 1]; channels before time, 4k+1 frames, sizes multiples
            of 8.

    Raises:
        MediaError: Wrong layout, number of frames, size or range.
        ModelError: The VAE tiles or slices, or returns non-finite latents.
    """
    _check_frames(frames)
    if vae.use_tiling or vae.use_slicing:
        raise ModelError("the VAE tiles or slices, which changes latents; call disable_tiling()")
    mean, std = _latent_statistics(vae)
    latents = []
    for clip in torch.split(frames, 1):
        pixels = clip.to(vae.device, non_blocking=vae.device.type == "cuda")
        if not pixels.is_floating_point():
            pixels = pixels.float() / 127.5 - 1
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        latents.append((posterior.mode().float() - mean) / std)
    result = torch.cat(latents)
    if not torch.isfinite(result).all():
        raise ModelError("the VAE returned NaN or infinite latents; use vae_dtype = float32")
    return result


@torch.no_grad()
def decode_latents(
    vae: Vae, latents: Float[torch.Tensor, "b c f h_8 w_8"]
) -> UInt8[torch.Tensor, "b t h w 3"]:
    """Decode latents to frames with the arithmetic of WanPipeline, bit for bit.

    raw = latents / (1 / std) + mean, in the VAE's dtype; frames = round(255 clamp(x/2 + 1/2)).
    """
    mean, std = _latent_statistics(vae)
    clips = []
    for clip in torch.split(latents, 1):
        raw = clip.to(vae.device, vae.dtype) / (1.0 / std).to(vae.dtype) + mean.to(vae.dtype)
        video = vae.decode(raw, return_dict=False)[0]
        unit = (video * 0.5 + 0.5).clamp(0, 1).float()
        clips.append((unit * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1))
    return torch.cat(clips)


def _check_frames(frames: torch.Tensor) -> None:
    """Refuse what the VAE would silently truncate or misread."""
    shape = tuple(frames.shape)
    if frames.ndim != 5 or shape[1] != 3:
        hint = "; it looks like [B, T, C, H, W]: permute(0, 2, 1, 3, 4)" if 3 in shape[2:3] else ""
        raise MediaError("bad_size", f"frames have shape {shape}; expected [B, 3, T, H, W]{hint}")
    if (shape[2] - 1) % 4:
        raise MediaError(
            "bad_size",
            f"{shape[2]} frames in {shape}; expected 4k+1 at dimension 2 of [B, 3, T, H, W] (the "
            "VAE would silently drop the rest)",
        )
    if shape[3] % 8 or shape[4] % 8:
        raise MediaError("bad_size", f"frames of {shape[3:]} px; expected multiples of 8")
    if frames.is_floating_point():
        low, high = frames.aminmax()
        if not (low >= -1 and high <= 1):  # also catches NaN
            raise MediaError(
                "bad_size",
                f"frames range from {low:.3g} to {high:.3g}; expected uint8, or floats in [-1, 1]",
            )
    elif frames.dtype != torch.uint8:
        raise MediaError("bad_size", f"frames are {frames.dtype}; expected uint8 or floating point")


def _latent_statistics(
    vae: Vae,
) -> tuple[Float32[torch.Tensor, "1 c 1 1 1"], Float32[torch.Tensor, "1 c 1 1 1"]]:
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=vae.device).view(shape)
    std = torch.tensor(vae.config.latents_std, device=vae.device).view(shape)
    return mean, std


# --- prompts ---


def load_text_encoder(folder: Path, *, dtype: torch.dtype, device: torch.device) -> TextEncoder:
    """Load UMT5 onto the device, tensor by tensor, with its tokenizer.

    The host holds at most a few tensors at a time, in `dtype`; the largest is the embedding.

    Raises:
        ModelError: Weights are missing or left over, the embedding is not tied (transformers
            5.0 to 5.2 silently leave it uninitialised), or transformers is too old.
    """
    from transformers import UMT5EncoderModel  # noqa: PLC0415  (decoding does not need it)

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < _MIN_TRANSFORMERS:
        raise ModelError(
            f"transformers {transformers.__version__} loads Wan's text encoder with an "
            "uninitialised embedding; install transformers>=5.3"
        )
    part = folder / "text_encoder"
    hide_bars_without_terminal()
    try:
        model, info = UMT5EncoderModel.from_pretrained(
            part, dtype=dtype, device_map={"": device}, output_loading_info=True,
            local_files_only=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"cannot load the text encoder in {part}: {error}") from error
    check_loading(info, part)
    if model.encoder.embed_tokens.weight.data_ptr() != model.shared.weight.data_ptr():
        raise ModelError(
            f"the text encoder in {part} was loaded with an untied embedding "
            f"(transformers {transformers.__version__}); install transformers>=5.3"
        )
    model = model.eval().requires_grad_(requires_grad=False)
    torch.set_float32_matmul_precision("highest")
    return TextEncoder(tokenizer=load_tokenizer(folder), model=model)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer alone: enough to count a prompt's tokens.

    Raises:
        ModelError: It cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the tokenizer in {folder / 'tokenizer'}: {error}") from error


def num_prompt_tokens(tokenizer: Any, prompt: str) -> int:
    """Count a prompt's tokens, `</s>` included; over 512 means its end would be cut off."""
    ids = tokenizer(clean_prompt(prompt), add_special_tokens=True, verbose=False).input_ids
    return len(ids)


@torch.no_grad()
def encode_prompts(
    encoder: TextEncoder, prompts: Sequence[str]
) -> list[Float[torch.Tensor, "l d"]]:
    """Encode prompts to the rows that carry text, on the CPU, in the encoder's dtype.

    Zero-padded to 512 rows, each is bit-equal to WanPipeline.encode_prompt(max_sequence_length=512)
    of that prompt: tokens are padded to 512 with a mask and encoded one prompt at a time, and rows
    past the mask are cut. The empty prompt is one `</s>` row, not zeros.

    Raises:
        ModelError: An embedding is not finite, or all its values are the same.
    """
    return [_encode_prompt(encoder, clean_prompt(prompt)) for prompt in prompts]


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Turn cleaned prompts into ids as the text encoder receives them: padded or cut to 512."""
    return [list(ids) for ids in _tokens(tokenizer, prompts).input_ids]


def _tokens(tokenizer: Any, prompts: Sequence[str], **options: Any) -> Any:
    return tokenizer(
        list(prompts),
        padding="max_length",
        max_length=MAX_SEQUENCE_LENGTH,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        **options,
    )


def _encode_prompt(encoder: TextEncoder, prompt: str) -> torch.Tensor:
    inputs = _tokens(encoder.tokenizer, [prompt], return_tensors="pt")
    device = encoder.model.device
    mask = inputs.attention_mask.to(device)
    states = encoder.model(inputs.input_ids.to(device), mask).last_hidden_state
    embeds: torch.Tensor = states[0, : int(mask.sum())].cpu()
    if not torch.isfinite(embeds).all() or embeds.float().std() == 0:
        raise ModelError(
            f"the text encoder returned NaN, infinite or constant values for {shorten(prompt)}; "
            "its weights are wrong, or text_dtype overflows (use bfloat16 or float32)"
        )
    return embeds
