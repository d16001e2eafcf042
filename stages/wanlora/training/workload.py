"""The micro-batch of a run, how its blocks run, and the result of its trial. Needs no torch.

Owns: the `Workload` of a variant and a bucket, for `cost.memory` and `cost.seconds`, and the share
of a GPU's memory that a step may take.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from wanlora.core.buckets import Bucket, num_tokens
from wanlora.cost.flops import Recompute
from wanlora.cost.memory import Quantize, Workload, step_bytes
from wanlora.wan.variants import Variant

Modes = tuple[Recompute, ...]


GPU_RESERVE = 0.05
"""Share of a GPU's memory for the context, gaps of the allocator and workspaces of kernels."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Measurements of a micro-batch.

    Attributes:
        modes: Activation mode of each block.
        seconds: Median of the timed passes, without compilation.
        peak_bytes: Peak memory of tensors on a GPU; None on other devices.
        attention: Attention operators that ran.
        non_finite: Adapter tensors whose gradient has NaN or infinite values.
        limit_bytes: Memory that a step could take when the modes were chosen.
    """

    modes: Modes
    seconds: float
    peak_bytes: int | None
    attention: tuple[str, ...]
    non_finite: tuple[str, ...] = ()
    limit_bytes: float = math.inf


def describe(modes: Sequence[Recompute]) -> str:
    """Format modes as the setting has them: `selective`, or `4 selective + 26 none`."""
    kinds = dict.fromkeys(modes)
    if len(kinds) == 1:
        return modes[0]
    return " + ".join(f"{list(modes).count(kind)} {kind}" for kind in kinds)


def is_compiled(eager: str, device_type: str, *, dora: bool) -> bool:
    """Return whether blocks are compiled on a device, from the setting `eager` (auto, on, off).

    auto is eager for DoRA: torch cannot compile the DoRA layers of peft 0.21 into one graph.

    Args:
        eager: The setting.
        device_type: `cuda` or `cpu`.
        dora: True if the adapter is a DoRA.
    """
    return device_type == "cuda" and not dora if eager == "auto" else eager == "off"


def workload(
    variant: Variant,
    bucket: Bucket,
    *,
    batch_size: int,
    rank: int,
    adapted: Collection[str],
    compiled: bool,
    element_bytes: int,
    num_uploaded: int = 5,
    quantize: Quantize = "none",
    num_streamed: int = 0,
) -> Workload:
    """Describe a run's micro-batch of a bucket to `cost.memory` and `cost.seconds`."""
    return Workload(
        shape=variant.shape,
        num_tokens=num_tokens(bucket),
        batch_size=batch_size,
        rank=rank,
        adapted=frozenset(adapted),
        compiled=compiled,
        element_bytes=element_bytes,
        num_uploaded=num_uploaded,
        quantize=quantize,
        num_streamed=num_streamed,
    )


def largest(works: Mapping[Bucket, Workload]) -> Bucket:
    """Bucket whose micro-batch takes the most memory."""
    everything: Recompute = "none"
    return max(
        works, key=lambda b: step_bytes(works[b], (everything,) * works[b].shape.num_layers).total
    )


def budget_of_gpu(total_bytes: float) -> float:
    """Bytes that a step may take on an otherwise free GPU, including the model's weights."""
    return (1 - GPU_RESERVE) * total_bytes
