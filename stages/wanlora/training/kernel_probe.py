"""Choose the attention kernel of a run: its gradients must be right, then the fastest is used.

Owns: the choice, and a kernel's time at the run's own shape. `kernel_check` checks its gradients,
`wan.attention` pins kernels and lists those of a device. Legend: B clips, N tokens, M keys,
H heads, D width of a head.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from wanlora.core import units
from wanlora.core.out_of_memory import is_out_of_memory, reason_of
from wanlora.errors import DeviceError
from wanlora.training.kernel_check import (
    Attend,
    AttentionShape,
    Case,
    both_passes,
    draw_inputs,
    first_difference,
    make_cases,
)
from wanlora.training.trial import timed
from wanlora.wan import attention

_TIMED_PASSES = 5
_TIMED_S = 0.2
"""After this many seconds of timed passes no other pass begins."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A kernel that may be chosen.

    Attributes:
        name: Setting of the kernel, see `attention.pinned`.
        pinned: Makes a block in which `attend` uses this kernel.
        attend: Attention of query `B H N D` with key and value `B H M D`.
    """

    name: str
    pinned: Callable[[], AbstractContextManager[None]]
    attend: Attend = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class Tried:
    """Result of a candidate.

    Attributes:
        name: The kernel.
        milliseconds: Median of a forward and a backward pass; None if it was not measured.
        problem: Reason why the kernel is not used; None if it may be.
        is_wrong: True if the kernel runs here and failed: a wrong result, or an error.
    """

    name: str
    milliseconds: float | None = None
    problem: str | None = None
    is_wrong: bool = False


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The attention kernel of a run.

    Attributes:
        name: The kernel, see `attention.pinned`.
        num_tokens: Tokens per clip of the timed passes.
        tried: Results of all candidates, in their order.
    """

    name: str
    num_tokens: int
    tried: tuple[Tried, ...]

    def describe(self) -> str:
        """Name the kernel and list the measured times, for logs and the run's record."""
        times = [
            f"{each.name} {each.milliseconds:.3g} ms"
            for each in self.tried
            if each.milliseconds is not None
        ]
        if not times:
            return f"{self.name}, not measured"
        return (
            f"{self.name}, for one layer forward and backward of {self.num_tokens:,} tokens: "
            f"{units.names(times, most=9)}"
        )


def kernel_for(setting: str, shape: AttentionShape, *, deterministic: bool = False) -> KernelChoice:
    """Check the kernel of a setting, or choose one for `auto`, and log the choice.

    By time only on CUDA, and not for deterministic runs: a choice by time may differ between two
    equal runs. They get the first kernel of the device's order whose gradients are right.

    Args:
        setting: A key of `attention.KERNELS`, or auto.
        shape: Attention of the run.
        deterministic: The run must compute the same bits each time.

    Raises:
        DeviceError: The kernel does not run here or its gradients are wrong; or none is right.
    """
    names = attention.candidates(shape.device) if setting == "auto" else (setting,)
    try:
        return _choose_by_name(names, shape, deterministic=deterministic)
    except DeviceError as error:
        if len(names) > 1:  # the message has the advice
            raise
        other = "math" if setting == "auto" else "auto"  # on a device with one kernel of torch's
        raise DeviceError(f"{error}: use --set attention={other}") from None


def recheck_kernel(name: str, shape: AttentionShape, *, deterministic: bool) -> KernelChoice:
    """Check the kernel that a run has used so far, and log it. Arguments as `kernel_for`.

    Raises:
        DeviceError: The kernel does not run here or its gradients are wrong. The message has the
            reason only.
    """
    return _choose_by_name((name,), shape, deterministic=deterministic)


def _choose_by_name(
    names: Sequence[str], shape: AttentionShape, *, deterministic: bool
) -> KernelChoice:
    device = shape.device
    choice = choose_kernel(
        shape,
        [Candidate(name, partial(attention.pinned, name, device)) for name in names],
        by_time=device.type == "cuda" and not deterministic,
        deterministic=deterministic,
    )
    logger.info("attention kernel %s", choice.describe())
    return choice


def choose_kernel(
    shape: AttentionShape,
    candidates: Sequence[Candidate],
    *,
    by_time: bool,
    deterministic: bool = False,
) -> KernelChoice:
    """Choose among kernels whose output and gradients are right.

    Args:
        shape: Attention of the run.
        candidates: Kernels, the preferred one first.
        by_time: Choose the fastest kernel; otherwise the first one that is right.
        deterministic: Reject a kernel whose gradients differ between two passes.

    Raises:
        DeviceError: No candidate is right; with the reason for each.
    """
    tried: list[Tried] = []
    known = list(make_cases(shape))
    for candidate in candidates:
        result = _try(candidate, shape, known, deterministic=deterministic)
        tried.append(result)
        if result.is_wrong:
            logger.warning("attention kernel %s is not used: %s", result.name, result.problem)
        elif result.problem:
            logger.debug("attention kernel %s: %s", result.name, result.problem)
        elif not by_time:
            break
    known.clear()
    if shape.device.type == "cuda":
        torch.cuda.empty_cache()  # the model has other sizes
    right = [each for each in tried if not each.problem]
    if not right:
        raise _nothing_right(shape, tried)
    times = {each.name: each.milliseconds for each in right if each.milliseconds is not None}
    best = min(times, key=times.__getitem__) if by_time and times else right[0].name
    return KernelChoice(best, shape.timed_tokens, tuple(tried))


def _try(
    candidate: Candidate, shape: AttentionShape, cases: Sequence[Case], *, deterministic: bool
) -> Tried:
    try:
        # torch warns about each kernel that does not run here; the error has the reason.
        with warnings.catch_warnings(action="ignore"), candidate.pinned():
            with attention.watched() as operators:
                candidate.attend(*cases[0].inputs)
            if attention.is_other(candidate.name, operators):
                ran = ", ".join(sorted(operators))
                return Tried(candidate.name, problem=f"{ran} ran in its place")
            problem = first_difference(candidate.attend, cases, deterministic=deterministic)
        if problem:
            return Tried(candidate.name, problem=problem, is_wrong=True)
        return Tried(candidate.name, milliseconds=_measure(candidate, shape))
    except DeviceError as error:
        return Tried(candidate.name, problem=str(error))
    except Exception as error:  # noqa: BLE001  (other packages' kernels may raise anything)
        if attention.is_missing(error):
            return Tried(candidate.name, problem="torch has none for these values")
        return Tried(candidate.name, problem=reason_of(error), is_wrong=True)


def _measure(candidate: Candidate, shape: AttentionShape) -> float | None:
    """Median milliseconds of a forward and a backward pass; None if memory does not suffice."""
    seconds: list[float] = []
    try:
        inputs, upstream = draw_inputs(
            shape, shape.timed_tokens, shape.timed_tokens, batch_size=shape.batch_size
        )
        with candidate.pinned():
            both_passes(candidate.attend, inputs, upstream)
            while len(seconds) < _TIMED_PASSES and sum(seconds) < _TIMED_S:
                seconds.append(
                    timed(lambda: both_passes(candidate.attend, inputs, upstream), shape.device)
                )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return 1000 * median(seconds)


def _nothing_right(shape: AttentionShape, tried: Sequence[Tried]) -> DeviceError:
    where = f"on {shape.device} with {shape.dtype} and {shape.num_tokens:,} tokens"
    if len(tried) == 1:
        name, problem = tried[0].name, tried[0].problem
        return DeviceError(f"attention={name} does not run correctly {where} ({problem})")
    reasons = units.names(
        (f"{each.name}: {each.problem}" for each in tried), most=9, separator="; "
    )
    return DeviceError(
        f"no fused attention kernel runs correctly {where} ({reasons}): update the driver and "
        "torch, or use --set attention=math, which is slow and takes much memory"
    )
