"""Compile the transformer's blocks or run them eagerly, and select what each recomputes.

Owns: the three ways of keeping activations, and their installation through diffusers' own hook for
gradient checkpointing. The transformer, its adapter and all names stay as they are. The results
are the same bits, except that compiled blocks round less often.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch._dynamo.exc import TorchDynamoException
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from wanlora.core.location import cache_home
from wanlora.cost.flops import Recompute
from wanlora.wan.saved_inputs import SavedInputs
from wanlora.wan.streaming import run_with_weights, surround

RECOMPILE_LIMIT = 1024
"""Maximum number of compiled versions of a block: up to four per bucket, two in training (the first
block's input needs no gradient), one in validation, one without the adapter. torch's default of 8
would end a run."""
CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"
"""Environment variable: folder of compiled kernels. torch's default, in /tmp, is not permanent."""

_ATTENTION = tuple(
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in (
        "cudnn_attention",
        "flash_attention",
        "efficient_attention",
        "flash_attention_for_cpu",
    )
)

# Neither a block nor its adapter draws random numbers, so their state need not be kept.
_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def _keep_attention(_context: object, operator: object, *_args: Any, **_kwargs: Any) -> Any:
    keep = operator in _ATTENTION
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


# A partial: under compile torch takes no closure here.
_contexts = partial(create_selective_checkpoint_contexts, _keep_attention)


def _keep_all(block: Callable[..., Any], *inputs: Any) -> Any:
    return block(*inputs)


def _recompute_but_attention(block: Callable[..., Any], *inputs: Any) -> Any:
    return _checkpoint(block, *inputs, context_fn=_contexts)


def _recompute_all(block: Callable[..., Any], *inputs: Any) -> Any:
    return _checkpoint(block, *inputs)


RUNNERS: dict[Recompute, Callable[..., Any]] = {
    "none": _keep_all,
    "selective": _recompute_but_attention,
    "full": _recompute_all,
}
"""Functions that run a block in each mode, except offload: full, with the input in host memory."""


def set_activations(
    transformer: WanTransformer3DModel, modes: Sequence[Recompute], *, compiled: bool
) -> None:
    """Choose how each block runs from now on.

    Compiled, a block is one graph without breaks for its shape; all blocks share it. Passes without
    gradients are compiled too. A new shape is compiled at its first use.

    Args:
        transformer: Transformer with its adapter.
        modes: Recompute mode of each block.
        compiled: Compile the blocks; a compiled block stays compiled.
    """
    runners = dict(RUNNERS)
    if compiled:
        keep_compiled_kernels()
        dynamo: Any = torch._dynamo.config  # noqa: SLF001  (its public name)
        dynamo.recompile_limit = dynamo.accumulated_recompile_limit = RECOMPILE_LIMIT
        for block in transformer.blocks:
            block.compile(fullgraph=True, dynamic=False)
            surround(block)
        # "none" runs the block itself, which is compiled. A checkpoint has to be inside the graph:
        # only there can the partitioner decide what to keep.
        for mode in ("selective", "full"):
            runners[mode] = torch.compile(RUNNERS[mode], fullgraph=True, dynamic=False)
    runners["offload"] = partial(SavedInputs(transformer.device).run, runners["full"])
    run_of = {
        block: run_with_weights(block, runners[mode], compiled=compiled and mode != "none")
        for block, mode in zip(transformer.blocks, modes, strict=True)
    }
    transformer.enable_gradient_checkpointing(lambda block, *inputs: run_of[block](*inputs))


def why_it_cannot_compile(error: RuntimeError) -> str | None:
    """Describe a compiler error in one line; None for an error of something else."""
    return str(error).splitlines()[0] if isinstance(error, TorchDynamoException) else None


def keep_compiled_kernels() -> None:
    """Keep Inductor's kernels from run to run, unless the user set another folder."""
    os.environ.setdefault(CACHE_DIR, str(cache_home() / "inductor"))
