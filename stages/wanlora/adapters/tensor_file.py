"""Write a safetensors file whose tensors are computed one after the other.

Owns: the layout of the file. safetensors' own writer needs all tensors in memory at once, which are
gigabytes per shard. Must not know: models and adapters.
"""

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names of types."""

Sizes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of each tensor."""


def write_tensors(file: Path, sizes: Sizes, tensor_of: Callable[[str], Tensor]) -> int:
    """Write a file; only one tensor is in memory at a time.

    Tensors are in the order of the size of their values, descending, so that each is aligned.

    Args:
        file: File to write.
        sizes: Tensors of the file.
        tensor_of: Function that computes a tensor of that type and shape on the CPU, by name.

    Returns:
        Bytes of all tensors.
    """
    names = sorted(sizes, key=lambda name: (-sizes[name][0].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape = sizes[name]
        start, end = end, end + dtype.itemsize * prod(shape)
        header[name] = {
            "dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]
        }  # fmt: skip
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as opened:
        opened.write(len(head).to_bytes(8, "little") + head)
        for name in names:
            tensor = tensor_of(name)
            assert (tensor.dtype, tuple(tensor.shape)) == sizes[name], name
            opened.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return end
