"""Select the attention kernel of both passes, and check which kernel ran.

Owns: the choice among torch's fused kernels. diffusers' transformer calls
`scaled_dot_product_attention`, whose order of preference on Hopper still starts with the slower
FlashAttention-2. The order is pinned in both passes, because the backward pass may recompute.
"""

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from wanlora.errors import ConfigError, DeviceError

_CUDNN, _FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
_EFFICIENT, _MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH

# A selected kernel is the only one allowed: torch raises an error and does not use another.
KERNELS: dict[str, tuple[SDPBackend, ...]] = {
    "cudnn": (_CUDNN,),
    "flash": (_FLASH,),
    "efficient": (_EFFICIENT,),
    "math": (_MATH,),
    "fa3": (_FLASH,),
    "fa4": (_FLASH,),
}
_IMPLEMENTATIONS = {"fa3": "FA3", "fa4": "FA4"}
"""Packages that can replace torch's own flash kernel."""
_HOPPER = 9
"""Compute capability from which cuDNN's kernel is the faster one (1.7 to 2.3 times, forward and
backward, in huggingface/transformers PR 48163)."""


def candidates(device: torch.device) -> tuple[str, ...]:
    """Kernels that `auto` chooses from on a device, the preferred one first.

    Those of other packages come last: a run that must not depend on timing takes torch's own.

    Args:
        device: Device to compute on.
    """
    if device.type == "cpu":
        return ("flash", "math")
    if device.type != "cuda":
        return ("auto",)  # torch has one kernel there
    is_new = torch.cuda.get_device_capability(device)[0] >= _HOPPER
    first = ("cudnn", "flash") if is_new else ("flash", "cudnn")
    return (*first, "efficient", *_IMPLEMENTATIONS)


def kernel_order(kernel: str, device: torch.device) -> tuple[SDPBackend, ...]:
    """Kernels allowed on a device, the preferred one first.

    `auto` is for passes without gradients, whose kernel is not probed. On CUDA it never takes the
    unfused `math` kernel, whose memory is quadratic in the tokens; on other devices torch chooses.

    Args:
        kernel: A key of `KERNELS`, or auto.
        device: Device to compute on.
    """
    if kernel != "auto":
        return KERNELS[kernel]
    if device.type != "cuda":
        return (_FLASH, _EFFICIENT, _MATH)
    if torch.cuda.get_device_capability(device)[0] >= _HOPPER:
        return (_CUDNN, _FLASH, _EFFICIENT)
    return (_FLASH, _CUDNN, _EFFICIENT)


@contextmanager
def pinned(kernel: str, device: torch.device) -> Iterator[None]:
    """Let attention run on the chosen kernels inside the block, and in the order of preference.

    Raises:
        DeviceError: The kernel's package is not installed or does not work here.
        ConfigError: See `require_native_dispatch`.
    """
    require_native_dispatch()
    implementation = _IMPLEMENTATIONS.get(kernel)
    if implementation:
        _activate(implementation)
    # Compiled code holds the kernel, and torch keeps it from run to run under a key that does not.
    compiler, tag = torch.compiler.config, torch.compiler.config.cache_key_tag
    compiler.cache_key_tag = f"{tag} attention={kernel}"
    try:
        with sdpa_kernel(list(kernel_order(kernel, device)), set_priority=True):
            yield
    finally:
        compiler.cache_key_tag = tag
        if implementation:
            torch.nn.attention.restore_flash_attention_impl()


def use_another(kernel: str, device: torch.device) -> str:
    """Return the setting that selects a kernel other than the one that ran.

    Args:
        kernel: As given to `pinned`.
        device: Device on which it ran; on CUDA the first choice is torch's own FlashAttention.
    """
    if device.type != "cuda":
        return "--set attention=math"
    return f"--set attention={'efficient' if kernel == 'flash' else 'flash'}"


def require_native_dispatch() -> None:
    """Refuse an environment that makes diffusers replace the kernel chosen here.

    Raises:
        ConfigError: DIFFUSERS_ATTN_BACKEND names another backend.
    """
    backend = os.environ.get("DIFFUSERS_ATTN_BACKEND", "native")
    if backend.lower() != "native":
        raise ConfigError(
            f"DIFFUSERS_ATTN_BACKEND={backend} in the environment would replace the attention "
            "kernel of training; unset it, and choose a kernel with --set attention=NAME"
        )


def is_missing(error: BaseException) -> bool:
    """Return True if torch raised this error because no allowed kernel runs on its input."""
    return any(text in str(error) for text in ("No viable backend", "No available kernel"))


def is_other(kernel: str, operators: Collection[str]) -> bool:
    """Return True if attention ran on a kernel other than the named one.

    A compiled math kernel is split into other operators, so it may be invisible here.

    Args:
        kernel: As given to `pinned`; any kernel is accepted for a name not in `KERNELS`.
        operators: As seen by `watched`.
    """
    if kernel not in KERNELS:
        return False
    name = "flash" if kernel in _IMPLEMENTATIONS else kernel
    return any(f"_{name}" not in operator for operator in operators)


@contextmanager
def watched() -> Iterator[set[str]]:
    """Collect the names of the attention operators that run inside the block, forward ones.

    They are in the set once the block has ended. Seen by the dispatcher, so compiled code counts.
    """
    seen: set[str] = set()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it prints two lines to the terminal otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield seen
    # The names alone: `key_averages()` builds the tree of calls, which takes seconds per step.
    recorded: Any = profile.profiler
    names = {event.name() for event in recorded.kineto_results.events()}
    seen |= {
        name.removeprefix("aten::")
        for name in names
        if re.match(r"aten::_scaled_dot_product_\w+", name) and not name.endswith("_backward")
    }


def _activate(implementation: str) -> None:
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None:
        raise DeviceError(
            f"FlashAttention {implementation} needs torch newer than {torch.__version__}"
        )
    try:
        activate(implementation)
    except (ImportError, RuntimeError, ValueError) as error:
        raise DeviceError(
            f"FlashAttention {implementation} for this torch and CUDA is not installed: {error}"
        ) from error
