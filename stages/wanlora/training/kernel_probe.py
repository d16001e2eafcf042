"""Choose the attention kernel of a run: its gradients must be right, then the fastest is used.

Owns: the check of a kernel's gradients against unfused attention in fp32, and its time at the run's
own shape. `wan.attention` pins kernels and lists those of a device. Legend: B clips, N tokens,
M keys, H heads, D width of a head.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from wanlora.core import units
from wanlora.core.out_of_memory import is_out_of_memory, reason_of
from wanlora.errors import DeviceError
from wanlora.training.trial import timed
from wanlora.wan import attention

MAX_ERROR = 0.02
"""Largest relative error (L2) of an output or a gradient. bf16 rounds at 0.4 %."""
CHECKED_TOKENS = 1152
"""Largest length of the check; a multiple of the 128 tokens that kernels compute at once."""
_TILE = 128
_CHECKED_CLIPS = 2
_TIMED_PASSES = 5
_TIMED_S = 0.2
"""After this many seconds of timed passes no other pass begins."""
_CPU_FLOPS = 2e9
"""Work of a timed pass on other devices than CUDA: at most about a second."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Attention of a run.

    Attributes:
        num_tokens: Tokens per clip of the largest bucket.
        other_tokens: Tokens per clip of other buckets.
        batch_size: Clips per micro-batch of the largest bucket.
        num_heads: Heads.
        head_dim: Width of a head.
        num_text_tokens: Keys of cross-attention.
        dtype: The transformer's type.
        device: Device to compute on.
    """

    num_tokens: int
    other_tokens: frozenset[int]
    batch_size: int
    num_heads: int
    head_dim: int
    num_text_tokens: int
    dtype: torch.dtype
    device: torch.device

    @property
    def timed_tokens(self) -> int:
        """Tokens of the timed pass: the largest bucket's; fewer if there is no CUDA."""
        if self.device.type == "cuda":
            return self.num_tokens
        # Two products of 2 N^2 D FLOPs per head forward, five backward.
        per_pair = 14 * self.batch_size * self.num_heads * self.head_dim
        return shorter(self.num_tokens, max(_TILE, int((_CPU_FLOPS / per_pair) ** 0.5)))


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    device = shape.device
    names = attention.candidates(device) if setting == "auto" else (setting,)
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
    cases = list(_cases(shape))
    for candidate in candidates:
        result = _try(candidate, shape, cases, deterministic=deterministic)
        tried.append(result)
        if result.is_wrong:
            logger.warning("attention kernel %s is not used: %s", result.name, result.problem)
        elif result.problem:
            logger.debug("attention kernel %s: %s", result.name, result.problem)
        elif not by_time:
            break
    cases.clear()
    if shape.device.type == "cuda":
        torch.cuda.empty_cache()  # the model has other sizes
    right = [each for each in tried if not each.problem]
    if not right:
        raise _nothing_right(shape, tried)
    times = {each.name: each.milliseconds for each in right if each.milliseconds is not None}
    best = min(times, key=times.__getitem__) if by_time and times else right[0].name
    return KernelChoice(best, shape.timed_tokens, tuple(tried))


def shorter(tokens: int, limit: int) -> int:
    """Largest length up to a limit with the same remainder mod 128; a kernel's edge cases too."""
    return tokens - max(0, -(-(tokens - limit) // _TILE)) * _TILE


class _Case(NamedTuple):
    """Attention whose result is known: inputs, the gradient of the output, and the expected values.

    Attributes:
        inputs: Query, key and value.
        upstream: Gradient of the output.
        expected: Output and gradients of the inputs in fp32.
    """

    inputs: tuple[Tensor, Tensor, Tensor]
    upstream: Tensor
    expected: tuple[Tensor, ...]


_RESULTS = ("output", "gradient of the query", "gradient of the key", "gradient of the value")


def _cases(shape: AttentionShape) -> Iterator[_Case]:
    """Self- and cross-attention of all lengths, in fp32 without a fused kernel."""
    reference = Candidate("math", partial(attention.pinned, "math", shape.device))
    lengths = {shape.num_tokens, *shape.other_tokens}
    for tokens in sorted({shorter(number, CHECKED_TOKENS) for number in lengths}):
        for num_keys in (tokens, shape.num_text_tokens):
            inputs, upstream = _draw(
                shape, tokens, num_keys, batch_size=min(shape.batch_size, _CHECKED_CLIPS)
            )
            exact = [
                each.detach().float().requires_grad_(each.requires_grad)
                for each in (*inputs, upstream)
            ]
            with reference.pinned():
                expected = _both_passes(reference.attend, (exact[0], exact[1], exact[2]), exact[3])
            yield _Case(inputs, upstream, expected)


def _draw(
    shape: AttentionShape, num_tokens: int, num_keys: int, *, batch_size: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Draw normal query, key, value and upstream gradient: `B H N D` views of `B N H D` tensors.

    That is diffusers' layout, and the values have about its scale: queries and keys are normalised.
    They are drawn on the device: a CPU would take seconds for each kernel at the run's size.
    """
    draws = torch.Generator(shape.device).manual_seed(0)

    def draw(number: int) -> Float[Tensor, "b h n d"]:
        size = (batch_size, number, shape.num_heads, shape.head_dim)
        values = torch.randn(size, generator=draws, device=shape.device)
        return values.to(shape.dtype).transpose(1, 2)

    query, key, value = (draw(n).requires_grad_() for n in (num_tokens, num_keys, num_keys))
    return (query, key, value), draw(num_tokens)


def _both_passes(
    attend: Attend, inputs: tuple[Tensor, Tensor, Tensor], upstream: Tensor
) -> tuple[Tensor, ...]:
    """Output of attention, and gradients of query, key and value."""
    output = attend(*inputs)
    return (output.detach(), *torch.autograd.grad(output, inputs, upstream))


def _try(
    candidate: Candidate, shape: AttentionShape, cases: Sequence[_Case], *, deterministic: bool
) -> Tried:
    try:
        # torch warns about each kernel that does not run here; the error has the reason.
        with warnings.catch_warnings(action="ignore"), candidate.pinned():
            with attention.watched() as operators:
                candidate.attend(*cases[0].inputs)
            if attention.is_other(candidate.name, operators):
                ran = ", ".join(sorted(operators))
                return Tried(candidate.name, problem=f"{ran} ran in its place")
            problem = _check(candidate.attend, cases, deterministic=deterministic)
        if problem:
            return Tried(candidate.name, problem=problem, is_wrong=True)
        return Tried(candidate.name, milliseconds=_measure(candidate, shape))
    except DeviceError as error:
        return Tried(candidate.name, problem=str(error))
    except Exception as error:  # noqa: BLE001  (other packages' kernels may raise anything)
        if attention.is_missing(error):
            return Tried(candidate.name, problem="torch has none for these values")
        return Tried(candidate.name, problem=reason_of(error), is_wrong=True)


def _check(attend: Attend, cases: Sequence[_Case], *, deterministic: bool) -> str | None:
    """Compare with the expected values; return the first difference."""
    for case in cases:
        found = _both_passes(attend, case.inputs, case.upstream)
        query, key, _ = case.inputs
        where = f"for {query.shape[2]} tokens and {key.shape[2]} keys"
        for name, value, expected in zip(_RESULTS, found, case.expected, strict=True):
            if not torch.isfinite(value).all():
                return f"its {name} {where} is not finite"
            error = float((value.float() - expected).norm() / expected.norm())
            if not error < MAX_ERROR:
                return f"its {name} {where} is {units.percent(error)} off"
        again = _both_passes(attend, case.inputs, case.upstream) if deterministic else found
        if not all(map(torch.equal, found, again)):
            return f"its gradients {where} differ between two passes"
    return None


def _measure(candidate: Candidate, shape: AttentionShape) -> float | None:
    """Median milliseconds of a forward and a backward pass; None if memory does not suffice."""
    seconds: list[float] = []
    try:
        inputs, upstream = _draw(
            shape, shape.timed_tokens, shape.timed_tokens, batch_size=shape.batch_size
        )
        with candidate.pinned():
            _both_passes(candidate.attend, inputs, upstream)
            while len(seconds) < _TIMED_PASSES and sum(seconds) < _TIMED_S:
                seconds.append(
                    timed(lambda: _both_passes(candidate.attend, inputs, upstream), shape.device)
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
        other = "math" if name == "auto" else "auto"  # on a device whose only candidate is torch's
        return DeviceError(
            f"attention={name} does not run correctly {where} ({problem}): use --set "
            f"attention={other}"
        )
    reasons = units.names(
        (f"{each.name}: {each.problem}" for each in tried), most=9, separator="; "
    )
    return DeviceError(
        f"no fused attention kernel runs correctly {where} ({reasons}): update the driver and "
        "torch, or use --set attention=math, which is slow and takes much memory"
    )
