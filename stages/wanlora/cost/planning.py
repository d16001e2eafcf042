"""The fastest way to run a step within a card's memory: recompute modes and streamed blocks.

Owns: the choice, by counted bytes and predicted seconds. 8-bit weights are never chosen here: they
change the results, so only a user can choose them.
"""

import math
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from wanlora.cost.flops import Recompute
from wanlora.cost.gpus import GPUS, Gpu
from wanlora.cost.memory import (
    NUM_SLOTS,
    Workload,
    all_modes,
    block_linear_bytes,
    step_bytes,
    streamed_blocks,
)
from wanlora.cost.seconds import predict_forward_seconds, predict_seconds
from wanlora.cost.streaming import PCIE_BYTES_PER_S, exposed_seconds

ASSUMED_GPU = GPUS["RTX 4090"]
"""Rates that decide between plans on a card whose own rates are not known."""


MIN_GAIN = 0.05
"""Share of a step's predicted time that streaming must save; the rates are assumptions."""


class Plan(NamedTuple):
    """Recompute modes and streamed blocks of a step, with their cost.

    Attributes:
        modes: Recompute mode of each block.
        num_streamed: Blocks whose weights wait in host memory.
        total_bytes: Counted memory of the step.
        seconds: Predicted seconds of a micro-batch, waiting for copies included.
    """

    modes: tuple[Recompute, ...]
    num_streamed: int
    total_bytes: float
    seconds: float


def fastest_plan(
    work: Workload,
    budget_bytes: float,
    gpu: Gpu | None,
    *,
    modes: tuple[Recompute, ...] | None = None,
    num_streamed: int | None = None,
) -> Plan:
    """Choose the fastest plan that fits; the one with the least memory if none fits.

    Without streamed blocks, unless they save more than `MIN_GAIN` of the time.

    Args:
        work: The largest micro-batch; its `num_streamed` is replaced.
        budget_bytes: Memory for a step, including weights.
        gpu: The card; None if its rates are not known.
        modes: Recompute modes, if they are set.
        num_streamed: Streamed blocks, if they are set.
    """
    rates = gpu or ASSUMED_GPU
    plans = [
        _plan(work, choice, budget_bytes, rates, num_streamed)
        for choice in ([modes] if modes else all_modes(work.shape.num_layers))
    ]
    fitting = [plan for plan in plans if plan.total_bytes <= budget_bytes]
    if fitting:
        best = min(fitting, key=_cost)
        resident = [plan for plan in fitting if not plan.num_streamed]
        simplest = min(resident, key=_cost, default=best)
        return simplest if (1 - MIN_GAIN) * simplest.seconds <= best.seconds else best
    return min(plans, key=lambda plan: plan.total_bytes)


def _cost(plan: Plan) -> tuple[float, int, int]:
    """Order of plans that fit; copies are hidden or not, but never free."""
    return plan.seconds, plan.modes.count("offload"), plan.num_streamed


def _plan(
    work: Workload,
    modes: tuple[Recompute, ...],
    budget_bytes: float,
    gpu: Gpu,
    num_streamed: int | None,
) -> Plan:
    """Complete a choice of modes with the fewest streamed blocks that fit."""
    resident = replace(work, num_streamed=0)
    number, layers = num_streamed, work.shape.num_layers
    if number is None:
        excess = step_bytes(resident, modes).total - budget_bytes
        block = block_linear_bytes(work.shape, work.element_bytes, work.quantize)
        number = min(layers, math.ceil(excess / block) + NUM_SLOTS) if excess > 0 else 0
    total = step_bytes(replace(work, num_streamed=number), modes).total
    return Plan(modes, number, total, _seconds(resident, modes, gpu, number))


def _seconds(work: Workload, modes: tuple[Recompute, ...], gpu: Gpu, num_streamed: int) -> float:
    """Seconds of a micro-batch, the same as those of `predict_seconds` and `predict_streaming`."""
    forward = _block_seconds(work, None, gpu)
    backward = [_block_seconds(work, mode, gpu) - forward for mode in modes]
    layers = len(modes)
    block_bytes = block_linear_bytes(work.shape, work.element_bytes, work.quantize)
    waits = exposed_seconds(
        [forward] * layers, backward, streamed_blocks(layers, num_streamed),
        copy_s=block_bytes / PCIE_BYTES_PER_S,
    )  # fmt: skip
    return forward * layers + sum(backward) + waits


@lru_cache(maxsize=256)
def _block_seconds(work: Workload, mode: Recompute | None, gpu: Gpu) -> float:
    """Seconds of a block with a mode, forward and backward; forward alone without a mode."""
    layers = work.shape.num_layers
    if mode is None:
        return predict_forward_seconds(work, gpu).times(work.batch_size).total / layers
    return predict_seconds(work, (mode,) * layers, gpu).total / layers
