"""Select the device. A real model never falls back to the CPU, which would take days silently.

Owns: the rule for `--device`, and the list of models that are small enough for a CPU.
Must not know: the weights of a model.
"""

import logging
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from wanlora.core.out_of_memory import is_out_of_memory, reason_of
from wanlora.errors import DeviceError
from wanlora.wan.model_folder import DEMO, MICRO, local_folder
from wanlora.wan.variants import variant_of

logger = logging.getLogger(__name__)

TOY = (
    "micro is a toy model, trained only on drawn shapes and stick figures: its results on other "
    "videos mean nothing. For real videos, use a GPU and the default --model"
)

_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def select_device(device: str, model: str, *, local_rank: int = 0) -> torch.device:
    """Find a working device for a `--device` value.

    `auto` takes CUDA, or for the micro model the CPU; never Apple's MPS, on which this release has
    not been run. A device that you name is used, or refused when it does not work.

    Args:
        device: auto, cpu, cuda, cuda:N or mps.
        model: The `--model` value; `micro` or a folder of that size may run on the CPU.
        local_rank: Index of this process among those of the machine: `auto` gives each its own GPU,
            unless there are more processes than GPUs.

    Raises:
        DeviceError: Names the driver, torch's CUDA build, and what to do.
        ModelError: There is no such model; this error comes before those of the device.
    """
    use_expandable_segments()
    if device != "auto":
        return _checked(torch.device(device))
    if torch.cuda.is_available():
        index = local_rank % torch.cuda.device_count()
        return _checked(torch.device(f"cuda:{index}" if index else "cuda"))
    if is_small(model):
        return torch.device("cpu")
    apple = "; --device mps uses Apple's GPU, which is not tested"
    raise DeviceError(
        f"no usable accelerator for {model}: {_explain()}. On a CPU this would take many hours; "
        "pass --device cpu if that is what you want. To try the commands without a GPU: --model "
        f"micro, but {TOY}" + (apple if torch.backends.mps.is_available() else "")
    )


def warn_of_toy(model: str) -> None:
    """Warn that results of the micro model mean nothing, except in the demo.

    Args:
        model: The `--model` value.
    """
    if is_small(model) and DEMO not in os.environ:
        logger.warning("%s", TOY)


def use_expandable_segments() -> None:
    """Let the allocator of CUDA grow its segments, unless the user has configured it.

    Buckets and modes of different sizes leave gaps between fixed segments. It is read when torch
    first allocates, so this has an effect only before that. Linux only, as in torch.
    """
    newer, older = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"  # renamed in torch 2.9
    if newer in os.environ or older in os.environ or sys.platform != "linux":
        return
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    os.environ[newer if version >= (2, 9) else older] = "expandable_segments:True"


def use_deterministic_algorithms(*, compiled: bool = False) -> None:
    """Let torch compute the same bits in every run, with slower kernels; before the first one.

    Args:
        compiled: The blocks are compiled.

    Raises:
        DeviceError: This torch has no deterministic mode for compiled blocks.
    """
    from torch._inductor import config as inductor  # noqa: PLC0415  (slow, and rarely needed)

    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True
    elif compiled:  # its compiler selects kernels by their time
        raise DeviceError(
            f"torch {torch.__version__} compiles no deterministic kernels; add --eager, or install "
            "a newer torch: pip install --constraint constraints.txt torch"
        )
    # Read when cuBLAS starts; without it deterministic matrix products are refused on a GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cudnn.benchmark = False


def current_in_thread(device: torch.device) -> Callable[[], None]:
    """Return an initializer for a pool whose threads use a GPU.

    A new thread's current GPU is number 0. Leaving `torch.cuda.stream` returns to the thread's
    current GPU, and that call alone makes a CUDA context there (0.5 GB), for each process.

    Args:
        device: Device that the threads copy to or pin memory for.
    """
    if device.type != "cuda":
        return _do_nothing
    index = torch.cuda.current_device() if device.index is None else device.index
    return partial(torch.cuda.set_device, index)


def _do_nothing() -> None:
    pass


def base_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn a dtype setting into the transformer's type: auto is bf16, but fp32 on a CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _checked(device: torch.device) -> torch.device:
    """Return the device if it can compute; a driver can be there and the kernels not."""
    if device.type == "cpu":
        return device
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(
            f"device mps does not work: it is for Apple's GPUs, and torch {torch.__version__} "
            "finds none here; leave --device out, or name another"
        )
    if device.type == "mps":
        logger.warning(
            "wanlora has not been run on device mps: compare a short run with --device cpu first"
        )
    try:
        torch.ones(2, device=device).sum().item()
    except (RuntimeError, AssertionError) as error:
        reason = reason_of(error)
        if is_out_of_memory(error):
            raise DeviceError(
                f"device {device} has no free memory ({reason}): stop the other programs that use "
                "it, or choose another --device"
            ) from None
        raise DeviceError(f"device {device} does not work ({reason}): {_explain()}") from None
    return device


def is_small(model: str) -> bool:
    """Return whether a model is the micro one, or a folder of its size. Downloads nothing.

    Raises:
        ModelError: It is neither a known name, nor a model's folder, nor a hub id.
    """
    folder = local_folder(model)
    return model == MICRO or (folder is not None and variant_of(folder).is_micro)


def _explain() -> str:
    """Describe the installed and the missing parts for CUDA."""
    driver = _driver()
    build = torch.version.cuda
    installed = f"NVIDIA driver {driver or 'not found'}, torch {torch.__version__} built " + (
        f"for CUDA {build}" if build else "without CUDA"
    )
    if build is None:
        return f"{installed}; install a CUDA build of torch from https://pytorch.org/get-started"
    if driver is None:
        return f"{installed}; install the NVIDIA driver"
    return f"{installed}; update the driver, or install a torch built for an older CUDA"


def _driver() -> str | None:
    try:
        text = _DRIVER_FILE.read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    return match.group(1) if match else "of unknown version"
