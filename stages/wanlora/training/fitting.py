"""Choose what a step recomputes, so that it fits into memory: by prediction, then by a trial.

Owns: the memory that a step may take, the choices to try, and the errors if none fits.
`cost.memory` predicts the bytes; `trial` measures them.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from wanlora.core import units
from wanlora.core.buckets import Bucket
from wanlora.cost.flops import Activations, Recompute
from wanlora.cost.gpus import gpu_of
from wanlora.cost.memory import Workload, longest_clip, plan, step_bytes, weight_bytes
from wanlora.cost.planning import fastest_plan
from wanlora.cost.streaming import PCIE_BYTES_PER_S
from wanlora.errors import DeviceError, NonFiniteError
from wanlora.training.trial import random_batch, try_modes
from wanlora.training.workload import GPU_RESERVE, Modes, Trial, budget_of_gpu, describe
from wanlora.wan import attention
from wanlora.wan.blocks import why_it_cannot_compile
from wanlora.wan.host_memory import free_host_memory, own_bytes, return_freed_memory
from wanlora.wan.variants import Variant

CPU_SHARE = 0.5
"""Share of the free memory of a machine that a step may take."""

_SMALL_BYTES = 100e6
"""Weights of a model whose steps are faster, and small enough, if freed memory is not returned."""

logger = logging.getLogger(__name__)


def budget(device: torch.device, *, whole_card: bool = False) -> float:
    """Bytes that a step may take, including memory that this process already uses.

    Mapped weights of a file are part of a machine's free memory, so they are not added to it.

    Args:
        device: The device.
        whole_card: All of a GPU's memory, instead of the memory that is free now.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if whole_card:
            return budget_of_gpu(total)
        held = torch.cuda.memory_reserved(device)
        return free + held - GPU_RESERVE * total
    return own_bytes() + CPU_SHARE * free_host_memory()


def plan_streaming(
    work: Workload,
    device: torch.device,
    *,
    activations: Activations,
    whole_card: bool = False,
) -> int:
    """Number of blocks to stream on a GPU, by counted memory and predicted seconds; logged if any.

    Args:
        work: The largest micro-batch.
        device: The GPU, before the transformer is loaded.
        activations: Mode of all blocks, or auto.
        whole_card: Plan for all of its memory, see `fit`.
    """
    limit, gpu = budget(device, whole_card=whole_card), gpu_of(torch.cuda.get_device_name(device))
    modes = None if activations == "auto" else (activations,) * work.shape.num_layers
    chosen = fastest_plan(work, limit, gpu, modes=modes)
    if chosen.num_streamed:
        resident = fastest_plan(work, limit, gpu, modes=modes, num_streamed=0)
        logger.info(
            "streaming %d of %d blocks from host memory, activations %s: %s counted of %s, %s "
            "predicted for the most expensive micro-batch (copies at an assumed %s/s). Without "
            "streaming: %s counted%s",
            chosen.num_streamed, work.shape.num_layers, describe(chosen.modes),
            units.size(chosen.total_bytes), units.size(limit), units.duration(chosen.seconds),
            units.size(PCIE_BYTES_PER_S), units.size(resident.total_bytes),
            f", {units.duration(resident.seconds)}" if resident.total_bytes <= limit else "",
        )  # fmt: skip
    return chosen.num_streamed


def fit(
    transformer: Any,
    work: Workload,
    bucket: Bucket,
    variant: Variant,
    *,
    activations: Activations,
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    whole_card: bool = False,
    passes: int = 1,
    reserved_bytes: int = 0,
) -> Trial:
    """Choose what the blocks recompute, by a trial of the most expensive micro-batch.

    Args:
        transformer: Transformer with its adapter, on the device.
        work: The micro-batch.
        bucket: Size of its clips.
        variant: Variant of the model.
        activations: Mode of all blocks, or auto: the fastest modes that fit.
        kernel: See `attention.pinned`.
        device: Device to compute on.
        dtype: The transformer's type.
        whole_card: Plan for all of a GPU's memory, not for its free memory, so that the plan is the
            same when a run continues.
        passes: Number of timed passes.
        reserved_bytes: Memory of a GPU that the run takes after the trial; reserved during it.

    Raises:
        NonFiniteError: A gradient is NaN or infinite, because of the attention kernel or the base.
        DeviceError: Out of memory (with settings that would fit), blocks do not compile, or the
            kernel does not run here.
    """
    batch = random_batch(
        bucket, work.batch_size, num_channels=variant.vae.z_dim,
        text_shape=(variant.shape.num_text_tokens, variant.shape.text_dim),
        has_condition=variant.is_i2v, image_shape=variant.image_shape,
    )  # fmt: skip
    is_large = weight_bytes(work.shape, work.element_bytes, work.quantize) > _SMALL_BYTES
    if device.type == "cpu" and is_large:
        return_freed_memory()
    limit = budget(device, whole_card=whole_card)
    errors = _TrialErrors(activations, work, bucket, kernel, device, dtype, limit)
    logger.info(
        "trying the largest bucket on %s, forward and backward: %s, %s tokens, batch_size %d",
        device, bucket, f"{work.num_tokens:,}", work.batch_size,
    )  # fmt: skip
    with (
        errors.translated(),
        attention.pinned(kernel, device),
        _reserved(reserved_bytes, device),
    ):
        trial = try_modes(
            transformer, batch, _choices(activations, work, limit),
            compiled=work.compiled, device=device, dtype=dtype, passes=passes,
        )  # fmt: skip
    if attention.is_other(kernel, trial.attention):
        raise errors.kernel_error(f" (ran: {', '.join(trial.attention)})")
    if trial.non_finite:
        raise errors.gradient_error(trial)
    return replace(trial, limit_bytes=limit)


@contextmanager
def _reserved(num_bytes: int, device: torch.device) -> Iterator[None]:
    """Allocate memory of a GPU inside the block, so that less is left for the code in it."""
    held = (
        torch.empty(num_bytes, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    )
    try:
        yield
    finally:
        del held


@dataclass(frozen=True, slots=True)
class _TrialErrors:
    """Errors of a trial, with the facts that their texts need."""

    activations: Activations
    work: Workload
    bucket: Bucket
    kernel: str
    device: torch.device
    dtype: torch.dtype
    limit: float

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Translate the libraries' errors that a user can fix."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise self._memory_error(error) from None
        except RuntimeError as error:
            if attention.is_missing(error):
                raise self.kernel_error() from error
            if reason := why_it_cannot_compile(error):
                raise DeviceError(
                    f"the blocks cannot be compiled on {self.device}: {reason}. Run with --eager, "
                    "or install what is missing (a C++ compiler; on a GPU, Triton)"
                ) from error
            raise

    def kernel_error(self, more: str = "") -> DeviceError:
        """Error of a kernel that was set and does not run."""
        return DeviceError(
            f"attention={self.kernel} does not run on {self.device} with {self.dtype} and "
            f"{self.work.num_tokens:,} tokens{more}: use --set attention=auto"
        )

    def gradient_error(self, trial: Trial) -> NonFiniteError:
        """Error of a gradient that is not finite in the trial."""
        ran = ", ".join(trial.attention) or self.kernel
        return NonFiniteError(
            f"the trial of the largest bucket ({self.bucket}, {self.work.num_tokens:,} tokens) on "
            f"random clips gives a gradient that is not finite, for "
            f"{units.names(trial.non_finite, most=1)}. Attention ran by {ran}; try another kernel: "
            f"{attention.use_another(self.kernel, self.device)}. If that does not help, the "
            "base's weights are damaged"
        )

    def _memory_error(self, error: Exception) -> DeviceError:
        work = self.work
        return DeviceError(
            f"out of memory on {self.device} with the largest bucket ({self.bucket}, "
            f"{work.num_tokens:,} tokens, batch_size {work.batch_size}): "
            f"{str(error).splitlines()[0]} A step may take {units.size(self.limit)} here. "
            + _advice(
                self.activations, work, self.bucket, self.limit, on_gpu=self.device.type == "cuda"
            )
        )


def _choices(activations: Activations, work: Workload, limit: float) -> list[Modes]:
    """Modes to try: those that are set, or the predicted ones and then smaller ones."""
    if activations != "auto":
        return [(activations,) * work.shape.num_layers]
    planned = plan(work, limit)
    counted = step_bytes(work, planned).total
    selective: Recompute = "selective"
    smaller = [plan(work, share * counted) for share in (0.9, 0.75, 0.5)]
    every = [planned, *smaller, (selective,) * work.shape.num_layers, plan(work, 0.0)]
    each = {modes: step_bytes(work, modes).total for modes in every}
    return sorted(each, key=lambda modes: each[modes], reverse=True)


def _advice(
    activations: Activations, work: Workload, bucket: Bucket, limit: float, *, on_gpu: bool
) -> str:
    """List settings that are predicted to fit, those that cost the least first."""
    layers = work.shape.num_layers

    def size(mode: Recompute, changed: Workload) -> float:
        return step_bytes(changed, (mode,) * layers).total

    advice = []
    if activations != "auto":
        cheaper: tuple[Recompute, ...] = ("none", "selective", "full", "offload")
        advice += [
            f"--activations {mode} ({units.size(size(mode, work))})"
            for mode in cheaper[cheaper.index(activations) + 1 :]
            if size(mode, work) < limit
        ]
    advice += _smaller_weights(work, limit) if on_gpu else []
    if work.batch_size > 1 and size("full", replace(work, batch_size=1)) < limit:
        advice.append("--batch-size 1 with more --gradient-accumulation-steps")
    shorter = longest_clip(work, bucket._replace(num_frames=bucket.num_frames - 4), "full", limit)
    if shorter:
        advice.append(
            f"--set train_frames={shorter.num_frames} --activations full, which trains on the "
            "first frames of longer clips"
        )
    if not advice:
        return "By the predicted memory, no settings of this model fit; use a larger GPU"
    return "By the predicted memory, these settings would fit: " + "; ".join(advice)


def _smaller_weights(work: Workload, limit: float) -> list[str]:
    """List settings of the weights on a GPU that are predicted to fit, with their memory."""
    streamed = fastest_plan(work, limit, None)
    found = [(f"--stream-blocks {streamed.num_streamed}", streamed)]
    if work.quantize == "none":
        eight_bits = replace(work, quantize="int8")
        resident = fastest_plan(eight_bits, limit, None, num_streamed=work.num_streamed)
        both = fastest_plan(eight_bits, limit, None)
        found.append(("--quantize int8", resident))
        if resident.total_bytes > limit:
            found.append((f"--quantize int8 --stream-blocks {both.num_streamed}", both))
    return [
        f"{text} ({units.size(plan.total_bytes)}, activations {describe(plan.modes)})"
        for text, plan in found
        if plan.total_bytes <= limit
    ]


def log_trial(trial: Trial, work: Workload) -> None:
    """Log how the blocks run, with predicted and measured memory."""
    counted = step_bytes(work, trial.modes)
    seen = f", {units.size(trial.peak_bytes)} measured" if trial.peak_bytes else ""
    logger.info(
        "activations %s: %s counted%s, of %s; blocks %s; attention by %s; %s for the most "
        "expensive micro-batch",
        describe(trial.modes), units.size(counted.total), seen, units.size(trial.limit_bytes),
        "compiled" if work.compiled else "eager",
        ", ".join(trial.attention) or "no known operator",
        units.duration(trial.seconds),
    )  # fmt: skip
