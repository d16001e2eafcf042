"""Placement of a pipeline's parts while videos are made: which wait in host memory, which stream.

Owns: the choice from the memory that is free. Must not know: how parts are moved, how blocks are
streamed.
"""

import logging
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from wanlora.core import units
from wanlora.core.buckets import Bucket
from wanlora.cost.flops import TransformerShape
from wanlora.cost.memory import NUM_SLOTS, Quantize, block_linear_bytes, weight_bytes
from wanlora.errors import ConfigError
from wanlora.wan.offload import (
    USED_SHARE,
    Offload,
    fitting,
    part_bytes,
    select_offload,
    working_bytes,
)
from wanlora.wan.streaming import require_streaming
from wanlora.wan.variants import Variant

logger = logging.getLogger(__name__)


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
    offload: Literal["auto", "none", "model", "sequential"],
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
    select = partial(
        select_offload, offload, folder, variant, size,
        device=device, dtype=dtype, quantize=quantize,
    )  # fmt: skip
    if stream_blocks == 0 or (stream_blocks == "auto" and device.type != "cuda"):
        return Placement(select(), 0)
    shape, free = variant.shape, free_bytes(device)
    working = working_bytes(variant, size, dtype)
    parts = part_bytes(folder, variant, device=device, dtype=dtype, quantize=quantize)
    if stream_blocks == "auto":
        chosen = select()
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
