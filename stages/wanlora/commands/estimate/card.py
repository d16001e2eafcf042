"""The device of an estimate: a GPU by its name, or the GPU of this machine.

Owns: the choice of the card, and the memory that a step may take on it. Must not import torch,
except to name the GPU of a machine that has a driver.
"""

import difflib
import sys
from dataclasses import dataclass
from pathlib import Path

from wanlora.cost.gpus import GPUS, MEMORY_GIB, Gpu, gpu_named, gpu_of, memory_of, other_size
from wanlora.errors import ConfigError
from wanlora.training.workload import budget_of_gpu

DEFAULT_GPU = "H100"

_GPU_DRIVERS = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Files of the drivers that torch can use as `cuda` on Linux: NVIDIA's, WSL's, AMD's."""


@dataclass(frozen=True, slots=True)
class Card:
    """Device of the run.

    Attributes:
        name: Name of the GPU or of the device.
        gpu: Its rates; None if they are not known.
        device: Its name in torch, such as `cuda:1`.
        limit_bytes: Memory that a step may take.
        element_bytes: Bytes of a value of the transformer.
    """

    name: str
    gpu: Gpu | None
    device: str
    limit_bytes: float
    element_bytes: int = 2

    @property
    def device_type(self) -> str:
        """`cuda`, `cpu` or `mps`."""
        return self.device.partition(":")[0]


def find_card(device: str, *, memory_gb: float | None) -> Card:
    """Find a GPU by name.

    Args:
        device: Name as people write it; `auto` = the GPU of this machine, else an H100.
        memory_gb: Memory in GB; None = as sold.

    Raises:
        ConfigError: The GPU is unknown and has no `memory_gb`, or its memory has another size.
    """
    name = (_gpu_here() or DEFAULT_GPU) if device == "auto" else device
    key = gpu_named(name)
    gpu = gpu_of(name) or GPUS.get(key or "")
    if memory_gb:
        return Card(key or name, gpu, "cuda", budget_of_gpu(memory_gb * 1e9))
    if gpu is None and key is None:
        raise ConfigError(_unknown(name))
    memory = gpu.memory_bytes if gpu else memory_of(key or "")
    if device != "auto" and (size := other_size(name, memory)):
        raise ConfigError(
            f"--device {name}: {key or name} is known with {memory / 2**30:.0f} GiB. For a card "
            f"with other memory, pass its size: --memory-gb {size}"
        )
    return Card(key or name, gpu, "cuda", budget_of_gpu(memory))


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, [*GPUS, *MEMORY_GIB], n=2, cutoff=0.5)
    meant = f" (did you mean {' or '.join(close)}?)" if close else ""
    return (
        f"--device {name}: unknown GPU{meant}. With --memory-gb N its memory is counted, without "
        "times; --probe measures on a device of this machine. GPUs whose times are predicted: "
        f"{', '.join(GPUS)}"
    )


def _gpu_here() -> str | None:
    """Name of this machine's GPU; torch is imported only if there is a driver."""
    if sys.platform == "linux" and not any(Path(name).exists() for name in _GPU_DRIVERS):
        return None
    import torch  # noqa: PLC0415  (two seconds)

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
