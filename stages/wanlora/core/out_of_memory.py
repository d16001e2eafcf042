"""Recognize that memory ran out, in every spelling that the libraries use.

Owns: the list of spellings. Must not import torch: the command line uses it too.
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from wanlora.errors import DeviceError

SPELLINGS = (
    "out of memory",  # torch's CUDA, MPS and XPU allocators, NCCL, Triton, "CUDA error: ..."
    "out_of_memory",  # the CUDA driver: CUDA_ERROR_OUT_OF_MEMORY
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED
    "allocation_failed",  # cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "can't allocate memory",  # torch's DefaultCPUAllocator
    "cannot allocate memory",  # ENOMEM
    "not enough memory",  # DefaultCPUAllocator on Windows, oneDNN
    "bad_alloc",  # C++
)
"""Parts of messages, in lower case."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the device or the machine had too little memory."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch.OutOfMemoryError, torch.AcceleratorError and all other errors of devices are these.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in text for part in SPELLINGS)


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@contextmanager
def explained_out_of_memory(explain: Callable[[str], str]) -> Iterator[None]:
    """Replace every spelling of out of memory by one refusal.

    Args:
        explain: Makes the message from the library's own reason; names what to change.

    Raises:
        DeviceError: Memory ran out inside the block.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceError(explain(reason_of(error))) from error
