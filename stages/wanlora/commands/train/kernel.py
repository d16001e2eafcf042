"""Select the attention kernel of a run: as set, as before, or by a probe.

Owns: the rule that a run that continues keeps its kernel. `training.kernel_probe` checks and times
kernels.
"""

import logging
from pathlib import Path

import torch

from wanlora.commands.train.data import Data
from wanlora.core.buckets import num_tokens
from wanlora.errors import DeviceError
from wanlora.runs import checkpoints
from wanlora.training.kernel_check import AttentionShape
from wanlora.training.kernel_probe import KernelChoice, kernel_for, recheck_kernel
from wanlora.wan.variants import Variant

logger = logging.getLogger(__name__)


def select_kernel(
    setting: str, shape: AttentionShape, checkpoint: Path | None, *, deterministic: bool
) -> KernelChoice:
    """Select and check the attention kernel, before the transformer is loaded.

    Call it on the main process only: all processes use the same kernel.

    Args:
        setting: A kernel, or auto.
        shape: From `attention_shape`.
        checkpoint: The run continues from it; None for a new run.
        deterministic: The run must compute the same bits each time.

    Raises:
        DeviceError: The kernel that is set does not run here, or none computes right gradients.
    """
    before = checkpoints.recorded_attention(checkpoint) if checkpoint else None
    if setting == "auto" and before:
        try:
            return recheck_kernel(before, shape, deterministic=deterministic)
        except DeviceError as error:
            logger.warning("the attention kernel of the run so far cannot be used: %s", error)
    choice = kernel_for(setting, shape, deterministic=deterministic)
    if before and choice.name != before:
        logger.warning(
            "the run continues with the attention kernel %s and used %s before: not bit for bit",
            choice.name, before,
        )  # fmt: skip
    return choice


def attention_shape(
    variant: Variant, data: Data, *, dtype: torch.dtype, device: torch.device
) -> AttentionShape:
    """Describe the attention of training, validation and previews.

    Args:
        variant: Variant of the model.
        data: Clips of the run.
        dtype: The transformer's type.
        device: Device to compute on.
    """
    sizes = {num_tokens(bucket): size.micro_batch for bucket, size in data.sizes.items()}
    held_out = {num_tokens(clip.bucket) for clip in data.held_out}
    return AttentionShape(
        num_tokens=max(sizes),
        other_tokens=frozenset(sizes) | held_out,
        batch_size=sizes[max(sizes)],
        num_heads=variant.shape.num_attention_heads,
        head_dim=variant.shape.attention_head_dim,
        num_text_tokens=variant.shape.num_text_tokens,
        dtype=dtype,
        device=device,
        num_image_tokens=variant.shape.num_image_tokens,
    )
