"""Out of memory, as torch, its backends, Triton and the host spell it, is one refusal."""

import errno

import numpy as np
import pytest
import torch

from wanlora.commands.cache_latents.encoder_memory import explain_out_of_memory
from wanlora.core.out_of_memory import explained_out_of_memory, is_out_of_memory
from wanlora.errors import DeviceError

SPELLINGS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't "
                 "allocate memory: you tried to allocate 9 bytes. Error code 12"),
    RuntimeError("not enough memory: you tried to allocate 9 bytes."),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]  # fmt: skip


@pytest.mark.parametrize("error", SPELLINGS, ids=str)
def test_every_spelling_is_the_refusal_of_both_stages(error):
    with (
        pytest.raises(DeviceError, match=r"^step 3: .+") as two,
        explained_out_of_memory(lambda reason: f"step 3: {reason}"),
    ):
        raise error
    assert two.value.__cause__ is error
    with (
        pytest.raises(DeviceError, match="--set vae_dtype"),
        explain_out_of_memory("encoding clip x", "--set vae_dtype=bfloat16"),
    ):
        raise error


def test_what_numpy_and_torch_raise_here_is_recognized():
    for allocate in (lambda: np.ones(2**50), lambda: torch.ones(2**50)):
        with pytest.raises((MemoryError, RuntimeError)) as raised:
            allocate()
        assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"),
        RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448"),
        ValueError("out of memory"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_any_other_error_passes_unchanged(error):
    with pytest.raises(type(error)) as raised, explained_out_of_memory(str):
        raise error
    assert raised.value is error
