"""Memory of this machine: how much is free, what loading weights takes of it, and the refusal.

Owns: the difference between memory that a process keeps and pages of files that the kernel can drop
and read again. Must not know: devices and models.
"""

import ctypes
import logging
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

import psutil
import torch
from safetensors import safe_open

from wanlora.core import units
from wanlora.errors import DeviceError
from wanlora.wan.weights import weight_files

logger = logging.getLogger(__name__)

CONTROL_GROUPS = Path("/sys/fs/cgroup")

_M_MMAP_THRESHOLD = -3
"""glibc's number of the option, from malloc.h."""
_RETURNED_BYTES = 1 << 20
"""Blocks from this size on are returned to the system as soon as they are freed."""

_LOADED_TOGETHER = 4
"""Number of tensors that transformers converts at once: its GLOBAL_WORKERS."""

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
"""safetensors' names of types."""


@dataclass(frozen=True, slots=True)
class HostBytes:
    """Host memory that loaded weights take.

    Attributes:
        kept: Bytes of tensors that are converted, and so copied.
        mapped: Bytes of tensors that are used from the file. The kernel drops such pages if memory
            is short, and reads them again when they are used.
    """

    kept: int = 0
    mapped: int = 0

    def __add__(self, other: "HostBytes") -> "HostBytes":
        return HostBytes(self.kept + other.kept, self.mapped + other.mapped)


def loading_bytes(part: Path, *, dtype: torch.dtype, device: torch.device) -> HostBytes:
    """Host memory that the weights of a sub-folder take, from the headers of their files.

    On a CPU all of them. For another device the largest tensors on their way to it.

    Args:
        part: Sub-folder of a model.
        dtype: Type that the weights are loaded in.
        device: Device that they are loaded to.

    Raises:
        ModelError: There are no weights, or two sets of them.
    """
    kept, mapped = dict[str, int](), dict[str, int]()
    for file in weight_files(part):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                stored = tensors.get_slice(name)
                same = _TYPES.get(stored.get_dtype()) == dtype
                (mapped if same else kept)[name] = prod(stored.get_shape()) * dtype.itemsize
    if device.type != "cpu":
        return HostBytes(kept=sum(sorted((kept | mapped).values())[-_LOADED_TOGETHER:]))
    return HostBytes(sum(kept.values()), sum(mapped.values()))


def require_host_memory(needed: HostBytes, what: str, *advice: str) -> None:
    """Refuse work that needs more memory than this machine has free; Linux would kill it later.

    Files that do not fit into the rest are slow to use, so that is logged.

    Args:
        needed: Memory that the work needs.
        what: The work, as in "loading the text encoder".
        advice: Options that need less memory.

    Raises:
        DeviceError: Both numbers, and the options.
    """
    free = free_host_memory()
    if needed.kept > free:
        options = "; ".join((*advice, "stop other programs, or use a machine with more memory"))
        raise DeviceError(
            f"{what} needs {units.size(needed.kept)} of this machine's memory, and "
            f"{units.size(free)} are free. Options: {options}"
        )
    if needed.kept + needed.mapped > free:
        options = "; ".join(advice)
        logger.warning(
            "%s: weights of %s are used from their files, and %s of memory are free, so parts of "
            "the files are read from the disk again and again%s", what, units.size(needed.mapped),
            units.size(free - needed.kept), f". Options: {options}" if options else "",
        )  # fmt: skip


def return_freed_memory() -> None:
    """Let glibc return tensors of 1 MB and more to the system when they are freed.

    By default it raises that size up to 32 MB while a program runs (mallopt(3), M_MMAP_THRESHOLD).
    Freed activations then stay in a heap full of gaps: a training step of T2V-1.3B at 17x240x416 on
    a CPU took 21.2 GB instead of 11.6, with 11.9 counted. The step takes 15 % longer. No effect if
    the environment configures malloc, or with another C library.
    """
    library = ctypes.CDLL(None)
    configured = "MALLOC_MMAP_THRESHOLD_" in os.environ or "GLIBC_TUNABLES" in os.environ
    if hasattr(library, "mallopt") and not configured:
        library.mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES)


def free_host_memory(root: Path = CONTROL_GROUPS, groups: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of memory that this process can still use: the machine's, or its control group's.

    Args:
        root: Mount point of control groups (version 2 or 1), which limit memory in containers and
            SLURM.
        groups: File that lists the control groups of this process.
    """
    free = int(psutil.virtual_memory().available)
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            names, mount = ("memory.max", "memory.current", ""), root
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            mount = root / "memory"
        else:
            continue
        folder = mount / group.strip().lstrip("/")
        for each in (folder, *folder.parents):
            if each.is_relative_to(mount):
                free = min(free, _left_in(each, *names, unlimited=free))
    return max(0, free)


def _left_in(group: Path, limit: str, used: str, prefix: str, *, unlimited: int) -> int:
    """Bytes left under a control group's limit; the file cache in it can be reclaimed."""
    try:
        most, taken = (int((group / name).read_text()) for name in (limit, used))
        lines = (group / "memory.stat").read_text().splitlines()
        stat = dict(line.split() for line in lines)
    except (OSError, ValueError):  # no limit ("max"), or no such group
        return unlimited
    cached = sum(int(stat.get(f"{prefix}{name}", 0)) for name in ("active_file", "inactive_file"))
    return most - taken + cached


def own_bytes() -> int:
    """Bytes that this process keeps in memory, without pages of files."""
    found = psutil.Process().memory_info()
    return int(found.rss - getattr(found, "shared", 0))
