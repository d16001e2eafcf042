"""Encoders of a first frame, for image-to-video models: the VAE, and CLIP's vision tower.

Owns: loading CLIP, and the exact numerics of both. Must not be imported by training.
Source: diffusers' WanImageToVideoPipeline (prepare_latents, encode_image).
Legend: c channels, f latent frames, h w height and width in px, m image tokens, e their width.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float32, UInt8
from PIL import Image
from transformers.utils import is_torchvision_available

from wanlora.core.out_of_memory import is_out_of_memory
from wanlora.errors import ModelError
from wanlora.wan.encoders import Vae
from wanlora.wan.weights import check_loading, hide_bars_without_terminal

_PROJECTION = "visual_projection.weight"
"""Weight of CLIPVisionModelWithProjection, with which some folders are saved. It is applied after
the last layer, and the transformer reads the output of the last layer but one."""

_PROCESSOR_FIELDS = (
    "do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale",
    "rescale_factor", "do_normalize", "image_mean", "image_std",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ImageEncoder:
    """CLIP's vision tower (transformers' CLIPVisionModel) and its preprocessing."""

    processor: Any
    model: Any


IMAGE_DTYPE = torch.float32
"""Compute type of CLIP in stage one, as in diffusers' documentation of Wan; 2.5 GB of weights."""

CONDITION_REVISION = 1
"""Revision of `encode_condition`, part of the provenance; increase it with every change."""


@torch.no_grad()
def encode_condition(
    vae: Vae, first_frame: UInt8[torch.Tensor, "3 h w"], *, num_frames: int
) -> Float32[torch.Tensor, "c f h_8 w_8"]:
    """Encode a first frame, followed by frames of value 0 in [-1, 1], to normalised latents.

    Bit-equal to the condition of WanImageToVideoPipeline.prepare_latents in fp32. It multiplies by
    1 / latents_std, and `encode_latents` divides by latents_std: latent frame 0 differs from that
    of the clip by the rounding of fp32.

    Args:
        vae: From `load_vae`.
        first_frame: First frame of the clip; sizes are multiples of 8.
        num_frames: Frames of the clip, 4k+1.

    Raises:
        ModelError: The VAE returns non-finite latents.
    """
    assert num_frames % 4 == 1, num_frames
    pixels = first_frame.to(vae.device).float() / 127.5 - 1
    video = pixels.new_zeros((1, 3, num_frames, *pixels.shape[1:]))
    video[0, :, 0] = pixels
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=vae.device).view(shape)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std, device=vae.device).view(shape)
    raw = vae.encode(video.to(vae.dtype)).latent_dist.mode().float()
    condition: torch.Tensor = ((raw - mean) * inverse_std)[0]
    if not torch.isfinite(condition).all():
        raise ModelError("the VAE returned NaN or infinite latents; use vae_dtype = float32")
    return condition


def load_image_encoder(folder: Path, *, dtype: torch.dtype, device: torch.device) -> ImageEncoder:
    """Load CLIP's vision tower, frozen, with its preprocessing.

    The preprocessing resizes with torchvision if it is installed, otherwise with Pillow, and the
    two differ in the last bits: this is transformers' rule, and that of plain diffusers.

    Args:
        folder: Model folder that holds `image_encoder/` and `image_processor/`.
        dtype: float32, as in diffusers' documentation of Wan.
        device: Device to compute on.

    Raises:
        ModelError: Weights are missing, left over or of another shape.
    """
    from transformers import CLIPVisionModel  # noqa: PLC0415  (a second)

    part = folder / "image_encoder"
    hide_bars_without_terminal()
    try:
        model, info = CLIPVisionModel.from_pretrained(
            part, dtype=dtype, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"cannot load the image encoder in {part}: {error}") from error
    unexpected = [name for name in info["unexpected_keys"] if name != _PROJECTION]
    check_loading({**info, "unexpected_keys": unexpected}, part)
    torch.backends.cudnn.allow_tf32 = False  # of the convolution that makes patches
    torch.set_float32_matmul_precision("highest")
    return ImageEncoder(
        _load_processor(folder), model.to(device).eval().requires_grad_(requires_grad=False)
    )


def processor_settings(folder: Path) -> dict[str, Any]:
    """Settings of CLIP's preprocessing that decide pixels, and the library that resizes.

    Raises:
        ModelError: The preprocessing cannot be loaded.
    """
    settings = json.loads(_load_processor(folder).to_json_string())
    decisive = {name: value for name, value in settings.items() if name in _PROCESSOR_FIELDS}
    return decisive | {"backend": "torchvision" if is_torchvision_available() else "pil"}


def _load_processor(folder: Path) -> Any:
    from transformers import CLIPImageProcessor  # noqa: PLC0415  (a second)

    part = folder / "image_processor"
    try:
        return CLIPImageProcessor.from_pretrained(part, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the preprocessing in {part}: {error}") from error


@torch.no_grad()
def encode_image(
    encoder: ImageEncoder, first_frame: UInt8[torch.Tensor, "3 h w"]
) -> Float[torch.Tensor, "m e"]:
    """Encode a first frame to the output of the last layer but one, on the CPU.

    Bit-equal to WanImageToVideoPipeline.encode_image of this picture, in the encoder's dtype.

    Raises:
        ModelError: The embedding is not finite.
    """
    picture = Image.fromarray(first_frame.permute(1, 2, 0).cpu().numpy())
    inputs = encoder.processor(images=picture, return_tensors="pt").to(encoder.model.device)
    states = encoder.model(**inputs, output_hidden_states=True).hidden_states[-2]
    embeds: torch.Tensor = states[0].cpu()
    if not torch.isfinite(embeds).all():
        raise ModelError(
            "the image encoder returned NaN or infinite values; its weights are wrong, or its type "
            "overflows (use float32)"
        )
    return embeds
