"""Placement of a pipeline's parts while videos are made: which wait in host memory, which stream.

Owns: the memory that videos need, and the choice from the memory that is free.
Must not know: how parts are moved, how blocks are streamed.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open

from wanlora.core import units
from wanlora.core.buckets import Bucket, num_tokens
from wanlora.cost.flops import TransformerShape
from wanlora.cost.memory import NUM_SLOTS, Quantize, block_linear_bytes, weight_bytes
from wanlora.errors import ConfigError
from wanlora.wan.host_memory import HostBytes, require_host_memory
from wanlora.wan.streaming import require_streaming
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


@dataclass(frozen=True, slots=True)
class Placement:
    """Parts of a pipeline that are not on the device all the time.

    Attributes:
        offload: Parts that wait in host memory and take turns. With streamed blocks, only the text
            encoder, the image encoder and the VAE take turns.
        num_streamed: Streamed blocks of each transformer.
    """

    offload: Offload
    num_streamed: int


def select_placement(
    offload: Offload | Literal["auto"],
    stream_blocks: int | Literal["auto"],
    folder: Path,
    variant: Variant,
    size: Bucket,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: Quantize = "none",
) -> Placement:
    """Turn two settings into a placement that fits into the free memory of the device.

    Args:
        offload: The `--offload` value.
        stream_blocks: The `--stream-blocks` value.
        folder: The model's folder.
        variant: Its variant.
        size: Size of the videos.
        device: Device that computes.
        dtype: Type of the transformers.
        quantize: Format of the weights in their blocks.

    Raises:
        ConfigError: The settings contradict each other, or the model has fewer blocks.
        DeviceError: The host memory cannot hold what waits in it.
    """
    if stream_blocks not in ("auto", 0) and offload == "sequential":
        raise ConfigError(
            "--offload sequential and --stream-blocks both copy layers to the GPU: leave out one; "
            "--stream-blocks is faster"
        )
    if device.type == "cpu" and stream_blocks in ("auto", 0):
        return Placement("none", 0)
    shape, free = variant.shape, free_bytes(device)
    working = working_bytes(variant, size, dtype)
    parts = part_bytes(folder, variant, device=device, dtype=dtype, quantize=quantize)
    if stream_blocks == 0 or (stream_blocks == "auto" and device.type != "cuda"):
        return Placement(_select_offload(offload, parts, working, device), 0)
    if stream_blocks == "auto":
        chosen = _select_offload(offload, parts, working, device)
        if chosen != "model" or max(parts.values()) + working <= free:
            return Placement(chosen, 0)
        beside = max(parts["text_encoder"], parts["vae"] + working)
        num_streamed = streamed_to_fit(
            shape, dtype, free - beside, len(variant.transformers), quantize=quantize
        )
    else:
        num_streamed, chosen = stream_blocks, "none" if offload == "auto" else offload
        if offload == "auto" and device.type == "cuda":
            resident = _resident_bytes(shape, dtype, num_streamed, quantize)
            parts |= {part.subfolder: resident for part in variant.transformers}
            chosen = fitting(parts, working, free)
    require_streaming(shape, num_streamed, dtype, len(variant.transformers), quantize=quantize)
    return Placement(chosen, num_streamed)


def _select_offload(
    setting: Offload | Literal["auto"],
    parts: Mapping[str, float],
    working: float,
    device: torch.device,
) -> Offload:
    """Turn `--offload` into the parts that wait; `auto` needs a GPU to choose from."""
    if setting == "none":
        return "none"
    offload: Offload = "none"
    if setting != "auto":
        offload = setting
    elif device.type == "cuda":
        offload = fitting(parts, working, free_bytes(device))
    if offload != "none":
        require_host_memory(
            HostBytes(kept=int(sum(parts.values()))),
            f"keeping the parts of the pipeline in main memory (--offload {offload})",
            "--offload none, if the GPU has that much free memory",
        )
    return offload


def free_bytes(device: torch.device) -> float:
    """Free memory of a GPU that a pipeline may use; without a limit for other devices."""
    if device.type != "cuda":
        return math.inf
    return USED_SHARE * torch.cuda.mem_get_info(device)[0]


def streamed_to_fit(
    shape: TransformerShape,
    dtype: torch.dtype,
    free: float,
    num_transformers: int = 1,
    *,
    quantize: Quantize = "none",
) -> int:
    """Smallest number of streamed blocks with which transformers fit; all blocks if none fits.

    Args:
        shape: Shape of each transformer.
        dtype: Type of their weights.
        free: Bytes of the device for their weights.
        num_transformers: Number of transformers that are on the device together.
        quantize: Format of the weights in their blocks.
    """
    for num_streamed in range(shape.num_layers + 1):
        needed = num_transformers * _resident_bytes(shape, dtype, num_streamed, quantize)
        if needed <= free:
            break
    weights = num_transformers * weight_bytes(shape, dtype.itemsize, quantize)
    logger.info(
        "weights of %s need %s of GPU memory, and %s are free for them",
        units.count(num_transformers, "transformer"), units.size(weights), units.size(max(0, free)),
    )  # fmt: skip
    return num_streamed


def _resident_bytes(
    shape: TransformerShape, dtype: torch.dtype, num_streamed: int, quantize: Quantize
) -> float:
    in_host_memory = max(0, num_streamed - NUM_SLOTS)
    block = block_linear_bytes(shape, dtype.itemsize, quantize)
    return weight_bytes(shape, dtype.itemsize, quantize) - in_host_memory * block


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
        "text_encoder": _num_values(folder / "text_encoder") * text_bytes,
        **{part: _num_values(folder / part) * 4 for part in ("vae", *with_image)},
    }


def _num_values(part: Path) -> int:
    """Number of values in the weight files of a sub-folder, from their headers."""
    total = 0
    for file in weight_files(part):
        with safe_open(file, framework="np") as tensors:
            names = list(tensors.keys())
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
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
