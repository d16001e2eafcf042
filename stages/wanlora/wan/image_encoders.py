"""Encoders of a first frame, for image-to-video models: CLIP's vision tower.

Owns: loading it and its exact numerics. Must not be imported by training.
Source: diffusers' WanImageToVideoPipeline (encode_image).
Legend: h w height and width in px, m image tokens, e their width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image

from wanlora.core.out_of_memory import is_out_of_memory
from wanlora.errors import ModelError
from wanlora.wan.weights import check_loading, hide_bars_without_terminal

_PROJECTION = "visual_projection.weight"
"""Weight of CLIPVisionModelWithProjection, with which some folders are saved. It is applied after
the last layer, and the transformer reads the output of the last layer but one."""


@dataclass(frozen=True, slots=True)
class ImageEncoder:
    """CLIP's vision tower (transformers' CLIPVisionModel) and its preprocessing."""

    processor: Any
    model: Any


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
    from transformers import CLIPImageProcessor, CLIPVisionModel  # noqa: PLC0415  (a second)

    part = folder / "image_encoder"
    hide_bars_without_terminal()
    try:
        model, info = CLIPVisionModel.from_pretrained(
            part, dtype=dtype, output_loading_info=True, local_files_only=True
        )
        processor = CLIPImageProcessor.from_pretrained(
            folder / "image_processor", local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"cannot load the image encoder in {part}: {error}") from error
    unexpected = [name for name in info["unexpected_keys"] if name != _PROJECTION]
    check_loading({**info, "unexpected_keys": unexpected}, part)
    torch.set_float32_matmul_precision("highest")
    return ImageEncoder(processor, model.to(device).eval().requires_grad_(requires_grad=False))


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
