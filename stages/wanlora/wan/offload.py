"""Parts of a pipeline that wait in main memory, if a GPU cannot hold all of them.

Owns: the memory that sampling needs, and the choice. Must not know: how parts are moved.
"""

import logging
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open

from wanlora.core import units
from wanlora.core.buckets import Bucket, num_tokens
from wanlora.cost.memory import Quantize, weight_bytes
from wanlora.wan.host_memory import HostBytes, require_host_memory
from wanlora.wan.variants import Variant
from wanlora.wan.weights import weight_files

Offload = Literal["none", "model", "sequential"]

logger = logging.getLogger(__name__)

_FORWARD_WIDTHS = 13
"""Values of the transformer's width per token that exist at once, as in a training step."""
_DECODE_BYTES = 10 * 96 * 4 * 4
"""Bytes per pixel of decoding: about ten fp32 tensors of 96 channels and the 4 frames of a latent
frame, which the VAE decodes at a time. Not measured on a GPU."""
USED_SHARE = 0.95
"""Share of the free memory of a GPU that the pipeline may take."""


def part_bytes(
    folder: Path,
    variant: Variant,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: Quantize = "none",
) -> dict[str, float]:
    """Bytes of the weights of each part, in the types that `load_pipeline` loads them in.

    Args:
        folder: The model's folder.
        variant: Its variant.
        device: Device that computes.
        dtype: Type of the transformers.
        quantize: Format of the weights in their blocks.
    """
    text_bytes = 4 if device.type == "cpu" else 2
    transformer = weight_bytes(variant.shape, dtype.itemsize, quantize)
    with_image = ("image_encoder",) if variant.shape.image_dim else ()
    return {
        **{part.subfolder: transformer for part in variant.transformers},
        "text_encoder": num_values(folder / "text_encoder") * text_bytes,
        **{part: num_values(folder / part) * 4 for part in ("vae", *with_image)},
    }


def num_values(part: Path) -> int:
    """Number of values in the weight files of a sub-folder, from their headers."""
    total = 0
    for file in weight_files(part):
        with safe_open(file, framework="np") as tensors:
            names = list(tensors.keys())
            total += sum(prod(tensors.get_slice(name).get_shape()) for name in names)
    return total


def working_bytes(variant: Variant, size: Bucket, dtype: torch.dtype) -> float:
    """Bytes that a forward pass or decoding needs beside the weights: the larger of the two.

    Args:
        variant: Variant of the model.
        size: Size of the video.
        dtype: Type of the transformers.
    """
    width = variant.shape.width
    forward = _FORWARD_WIDTHS * num_tokens(size) * width * dtype.itemsize
    return float(max(forward, _DECODE_BYTES * size.height * size.width))


def select_offload(
    setting: Literal["auto", "none", "model", "sequential"],
    folder: Path,
    variant: Variant,
    size: Bucket,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: Quantize = "none",
) -> Offload:
    """Turn an offload setting into the parts that wait in main memory.

    Args:
        setting: The `--offload` value.
        folder: The model's folder.
        variant: Its variant.
        size: Size of the videos.
        device: Device that computes.
        dtype: Type of the transformers.
        quantize: Format of the weights in their blocks.

    Raises:
        DeviceError: The main memory cannot hold the parts.
    """
    if device.type == "cpu" or setting == "none":
        return "none"
    parts = part_bytes(folder, variant, device=device, dtype=dtype, quantize=quantize)
    offload: Offload = "none"
    if setting != "auto":
        offload = setting
    elif device.type == "cuda":
        free = USED_SHARE * torch.cuda.mem_get_info(device)[0]
        offload = fitting(parts, working_bytes(variant, size, dtype), free)
    if offload != "none":
        require_host_memory(
            HostBytes(kept=int(sum(parts.values()))),
            f"keeping the parts of the pipeline in main memory (--offload {offload})",
            "--offload none, if the GPU has that much free memory",
        )
    return offload


def fitting(parts: Mapping[str, float], working: float, free: float) -> Offload:
    """Keep all parts on the device if they fit, else one at a time, and log the choice.

    Args:
        parts: Bytes of the weights of each part.
        working: Bytes of the work beside the weights.
        free: Bytes of the device's memory that may be used.
    """
    needed = sum(parts.values()) + working
    if needed <= free:
        return "none"
    largest = max(parts, key=lambda name: parts[name])
    logger.info(
        "all parts of the pipeline need about %s of GPU memory, and %s are free: one part at a "
        "time is on the GPU (--offload model); the largest is %s with %s",
        units.size(needed), units.size(free), largest, units.size(parts[largest]),
    )  # fmt: skip
    return "model"
