"""Bytes of a training step, counted from the transformer's shape, and what to recompute to fit.

Owns: the memory that a block keeps for its backward pass in each recompute mode, the other memory
of a step, and the choice of a mode for every block. The counts are those of torch 2.13 on the block
of diffusers 0.42; `tests/numerics/test_memory.py` counts them again. Legend: width W of a token and
F of the FFN.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from wanlora.core.buckets import TEMPORAL_FACTOR, Bucket, num_tokens
from wanlora.cost.flops import Recompute, TransformerShape

Quantize = Literal["none", "int8", "fp8"]
"""Format of the blocks' frozen linear weights: the transformer's own type, or 8 bits per value."""

NUM_SLOTS = 2
"""Blocks that streaming keeps on the device at a time: one that computes and the next one."""

# Values of width W that a block keeps for each token when nothing is recomputed, its own input
# among them: 20 eagerly (the fp32 inputs of three norms count twice), 14 compiled, because
# the partitioner recomputes cheap values. Selective: its input and two attention outputs. Full: its
# input. Offload: nothing; its input is in host memory. The GELU's input of width F and the rank-r
# values of each adapted linear come on top of "none".
_WIDTHS = {"none": (20, 14), "selective": (3, 3), "full": (1, 1), "offload": (0, 0)}
_IMAGE_WIDTHS = {"none": (2, 1), "selective": (1, 1), "full": (0, 0), "offload": (0, 0)}
"""Those of attention to the embeddings of an image: its output, and eagerly the sum of both."""
_OF_KEYS = {f"attn2.{name}" for name in ("to_k", "to_v", "add_k_proj", "add_v_proj")}
"""Modules whose input is the prompt or the image, not the clip."""
_STATISTICS = 11
"""fp32 values per token that norms keep, compiled or not."""
_TRANSIENT_WIDTHS = 13
"""Values of width W per token that exist at once besides kept ones: gradients in flight."""
_BYTES_PER_TRAINED = 2 + 2 + 4 + 4 + 8
"""Bytes per trained parameter: it and its gradient in bf16; master, gradient, 2 moments in fp32."""


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Peak memory of a step by purpose, without the CUDA context and fragmentation.

    Attributes:
        weights: The frozen transformer.
        adapter: Parameters, masters, gradients and moments of the adapter.
        kept: Activations kept for the backward pass, at the time of the peak.
        working: Other memory at that time.
    """

    weights: float
    adapter: float
    kept: float
    working: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.adapter + self.kept + self.working


@dataclass(frozen=True, slots=True)
class Workload:
    """Everything that determines the bytes of a step, except the recompute modes.

    Attributes:
        shape: The transformer.
        num_tokens: Tokens per clip.
        batch_size: Clips per micro-batch.
        rank: Rank of the LoRA.
        adapted: Names of the adapted modules, for example `blocks.0.attn1.to_q`.
        compiled: True if blocks are compiled.
        element_bytes: Bytes per value of the transformer's dtype: 2 for bf16.
        num_uploaded: Micro-batches on the device ahead of the step.
        quantize: Format of the frozen linear weights of the blocks.
        num_streamed: Blocks whose linear weights are in host memory, see `streamed_blocks`.
    """

    shape: TransformerShape
    num_tokens: int
    batch_size: int
    rank: int
    adapted: frozenset[str]
    compiled: bool
    element_bytes: int = 2
    num_uploaded: int = 5
    quantize: Quantize = "none"
    num_streamed: int = 0

    @property
    def all_tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.num_tokens * self.batch_size


@lru_cache(maxsize=256)
def block_bytes(work: Workload, mode: Recompute) -> float:
    """Bytes that one block keeps from its forward to its backward pass."""
    shape, element = work.shape, work.element_bytes
    width = shape.width
    reads_image = shape.image_dim is not None
    values = float(_WIDTHS[mode][work.compiled] * width)
    values += reads_image * _IMAGE_WIDTHS[mode][work.compiled] * width
    statistics = 0.0
    if mode in ("none", "selective"):  # logsumexp of all attentions
        statistics += (2 + reads_image) * shape.num_attention_heads
    if mode == "none":
        adapted = {re.sub(r"^blocks\.\d+\.", "", name) for name in work.adapted}
        values += shape.ffn_dim + work.rank * len(adapted - _OF_KEYS)
        values += shape.ffn_dim * ("ffn.net.2" in adapted) + width * ("ffn.net.0.proj" in adapted)
        statistics += _STATISTICS
    num_keys = shape.num_text_tokens + shape.num_image_tokens
    of_keys = 4.0 * width * element * num_keys if mode == "none" else 0.0
    return work.all_tokens * (values * element + 4 * statistics) + work.batch_size * of_keys


def step_bytes(work: Workload, modes: Sequence[Recompute]) -> StepBytes:
    """Peak bytes of a training step.

    Args:
        work: The step.
        modes: Recompute mode of each block.
    """
    transient = _TRANSIENT_WIDTHS * work.all_tokens * work.shape.width * work.element_bytes
    everything = sum(block_bytes(work, mode) for mode in modes)
    offloaded = min(NUM_SLOTS, list(modes).count("offload")) * block_bytes(work, "full")
    everything += offloaded  # inputs that are on the device
    moments: list[tuple[float, float]] = [(everything, transient)]  # the backward pass begins
    recomputed = [index for index, mode in enumerate(modes) if mode != "none"]
    if recomputed:
        # The last recomputing block is running: the blocks after it are done and free, and all its
        # activations exist for a moment.
        before = sum(block_bytes(work, mode) for mode in modes[: recomputed[-1] + 1])
        before += offloaded
        moments.append((before, transient + block_bytes(work, "none")))
    kept, working = max(moments, key=sum)
    if work.quantize != "none":
        working += work.shape.width * work.shape.ffn_dim * work.element_bytes  # one at a time
    return StepBytes(
        weights=resident_bytes(work),
        adapter=float(_BYTES_PER_TRAINED * num_trained(work.shape, work.adapted, work.rank)),
        kept=kept,
        working=working + uploaded_bytes(work),
    )


def uploaded_bytes(work: Workload) -> float:
    """Bytes of the micro-batches on the device ahead of the step, in fp32."""
    shape = work.shape
    # Latents, noise and, of an image-to-video model, the image's latents.
    num_latents = 3 if shape.in_channels > shape.out_channels else 2
    latents = num_latents * work.all_tokens * 4 * shape.out_channels
    embeds = shape.num_text_tokens * shape.text_dim
    embeds += shape.num_image_tokens * (shape.image_dim or 0)
    return 4.0 * work.num_uploaded * (latents + work.batch_size * embeds)


def plan(work: Workload, budget_bytes: float) -> tuple[Recompute, ...]:
    """Choose the fastest recompute modes that fit: selective; the last blocks keep what fits.

    The last blocks, because their memory is free again before the others recompute. If not even
    selective fits, the first blocks are full; if not even full fits, they are offloaded; if nothing
    fits, all blocks are.

    Args:
        work: The largest micro-batch.
        budget_bytes: Memory for a step, including weights.
    """
    layers = work.shape.num_layers
    ways: tuple[tuple[Recompute, Recompute], ...] = (
        ("selective", "none"), ("full", "selective"), ("offload", "full"),
    )  # fmt: skip
    offload: Recompute = "offload"
    for first, last in ways:
        for num_last in range(layers, -1, -1):
            modes: tuple[Recompute, ...] = (first,) * (layers - num_last) + (last,) * num_last
            if step_bytes(work, modes).total <= budget_bytes:
                return modes
    return (offload,) * layers


def resident_bytes(work: Workload) -> float:
    """Bytes of the frozen transformer on the device: resident blocks, and the slots of others."""
    block = block_linear_bytes(work.shape, work.element_bytes, work.quantize)
    in_host_memory = work.num_streamed - min(work.num_streamed, NUM_SLOTS)
    return weight_bytes(work.shape, work.element_bytes, work.quantize) - in_host_memory * block


def host_bytes(work: Workload) -> float:
    """Bytes of host memory that the streamed blocks take, in each process."""
    return work.num_streamed * block_linear_bytes(work.shape, work.element_bytes, work.quantize)


def streamed_blocks(num_layers: int, num_streamed: int) -> tuple[int, ...]:
    """Indices of the blocks that are streamed, rising and evenly spaced.

    Between two of them resident blocks compute, so that a copy has more time than one block.

    Args:
        num_layers: Blocks of the transformer.
        num_streamed: Number of streamed blocks, at most `num_layers`.
    """
    return tuple((2 * k + 1) * num_layers // (2 * num_streamed) for k in range(num_streamed))


def block_linear_bytes(
    shape: TransformerShape, element_bytes: int = 2, quantize: Quantize = "none"
) -> float:
    """Bytes of the weight matrices of one block: what a copy of a streamed block moves."""
    per_value = element_bytes if quantize == "none" else 1
    return float(_block_linear_values(shape) * per_value)


def _block_linear_values(shape: TransformerShape) -> int:
    of_image = 2 * shape.width**2 if shape.image_dim else 0
    return 8 * shape.width**2 + 2 * shape.width * shape.ffn_dim + of_image


def weight_bytes(
    shape: TransformerShape, element_bytes: int = 2, quantize: Quantize = "none"
) -> float:
    """Bytes of the frozen transformer; diffusers keeps norms, tables and time embedder in fp32.

    Weights of 8 bits have one scale of the transformer's type for each output feature.
    """
    width, ffn = shape.width, shape.ffn_dim
    patch, head = 4 * shape.in_channels, 4 * shape.out_channels
    of_image = 2 * width if shape.image_dim else 0  # output features of the keys and values
    outputs = 9 * width + ffn + of_image
    norms = (5 if shape.image_dim else 4) * width
    in_type = shape.num_layers * (outputs + norms)  # biases, norms of q and k
    if quantize != "none":
        in_type += shape.num_layers * outputs
    in_type += width * patch + width + width * head + head  # patch embedding and head
    in_type += shape.text_dim * width + width * width + 2 * width  # text embedder
    in_type += 6 * (width * width + width)  # time projection
    in_fp32 = shape.num_layers * (6 + 2) * width + 2 * width
    in_fp32 += shape.freq_dim * width + width * width + 2 * width  # time embedder
    if image := shape.image_dim:
        in_type += image * image + image + image * width + width  # image embedder
        in_fp32 += 2 * image + 2 * width  # its norms
    linears = shape.num_layers * block_linear_bytes(shape, element_bytes, quantize)
    return linears + float(in_type * element_bytes + in_fp32 * 4)


@lru_cache(maxsize=256)
def num_trained(shape: TransformerShape, adapted: frozenset[str], rank: int) -> int:
    """Parameters of a LoRA: rank (in + out) for each adapted linear."""
    return sum(rank * sum(_sizes(shape, name)) for name in adapted)


def _sizes(shape: TransformerShape, name: str) -> tuple[int, int]:
    width = shape.width
    special = {
        "ffn.net.0.proj": (width, shape.ffn_dim),
        "ffn.net.2": (shape.ffn_dim, width),
        "time_embedder.linear_1": (shape.freq_dim, width),
        "text_embedder.linear_1": (shape.text_dim, width),
        "time_proj": (width, 6 * width),
        "proj_out": (width, 4 * shape.out_channels),
    }
    if image := shape.image_dim:
        special["image_embedder.ff.net.0.proj"] = (image, image)
        special["image_embedder.ff.net.2"] = (image, width)
    return next((sizes for end, sizes in special.items() if name.endswith(end)), (width, width))


def longest_clip(
    work: Workload, bucket: Bucket, mode: Recompute, budget_bytes: float
) -> Bucket | None:
    """Find the longest clip of a size that fits with one mode for all blocks; None if none fits.

    Args:
        work: The run; its `num_tokens` is replaced.
        bucket: Height, width and maximum number of frames.
        mode: Recompute mode of all blocks.
        budget_bytes: Memory for a step.
    """
    for frames in range(bucket.num_frames, 0, -TEMPORAL_FACTOR):
        shorter = bucket._replace(num_frames=frames)
        fitted = replace(work, num_tokens=num_tokens(shorter))
        if step_bytes(fitted, (mode,) * work.shape.num_layers).total <= budget_bytes:
            return shorter
    return None
