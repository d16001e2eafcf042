"""Host memory that a GPU copies from and to while it computes.

Owns: pinned buffers. torch's own are rounded up to a power of two bytes, which costs up to half of
the memory for weights of these sizes.
"""

import mmap
from typing import Any
from weakref import finalize

import torch
from torch import Tensor

from wanlora.core import units
from wanlora.errors import DeviceError
from wanlora.wan.host_memory import HostBytes, require_host_memory

_PAGE_BYTES = mmap.PAGESIZE
_ADVICE = "a smaller --stream-blocks, or other --activations than offload"


class HostBuffer:
    """Bytes in host memory; pinned if the device is a GPU.

    Args:
        num_bytes: Its size.
        device: Device that copies from and to it.

    Raises:
        DeviceError: The machine lacks so much memory, or the driver does not pin it.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        require_host_memory(HostBytes(kept=num_bytes), "a copy of a block's values", _ADVICE)
        # Whole pages of its own: a page cannot be pinned twice.
        whole = -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
        padded = torch.empty(whole + _PAGE_BYTES, dtype=torch.uint8)
        start = -padded.data_ptr() % _PAGE_BYTES
        self._bytes = padded[start : start + whole]
        self.num_bytes = num_bytes
        if device.type == "cuda":
            _pin(self._bytes)
            # Not at exit: the driver does it, and a call after a CUDA error would fail.
            finalize(self, _unpin, self._bytes, device).atexit = False

    def view_as(self, tensor: Tensor, start: int = 0) -> Tensor:
        """Part of the buffer with the type and shape of a tensor.

        Args:
            tensor: A contiguous tensor.
            start: Offset in bytes, a multiple of the size of a value.
        """
        part = self._bytes[start : start + tensor.nbytes]
        return part.view(tensor.dtype).view(tensor.shape)


def _pin(buffer: Tensor) -> None:
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = int(cudart.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    if error:
        raise DeviceError(
            f"cannot pin {units.size(buffer.nbytes)} of host memory (CUDA error {error}): use "
            f"{_ADVICE}, or free host memory"
        )


def _unpin(buffer: Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may still run
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    cudart.cudaHostUnregister(buffer.data_ptr())
