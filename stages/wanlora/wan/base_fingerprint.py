"""Fingerprint of a transformer's weights: which base model a loss or a checkpoint belongs to.

Owns: the sampled values. Must not know: how weights are loaded or quantized.
"""

import hashlib

import torch
from torch import Tensor, nn

SAMPLED_VALUES = 1024
"""Minimum number of values per tensor in a fingerprint; models differ in nearly all values."""


def sampled_values(tensor: Tensor) -> Tensor:
    """Evenly spaced values of a tensor, in bf16: equal for a model loaded in fp32 and in bf16."""
    flat = tensor.detach().flatten()
    sampled = flat[:: max(1, len(flat) // SAMPLED_VALUES)].to(torch.bfloat16, copy=True)
    return sampled.contiguous()  # a view would keep the whole tensor in memory


def base_fingerprint(transformer: nn.Module) -> str:
    """Hex sha256 of evenly spaced values of every tensor: which base model this is.

    Takes milliseconds, and needs no file. It is the same for a model that was loaded in fp32, in
    bf16 and quantized.

    Args:
        transformer: From `load_transformer`, before an adapter is added.
    """
    tensors: dict[str, Tensor] = dict(transformer.state_dict())
    samples = {name: sampled_values(tensor) for name, tensor in tensors.items()}
    for name, module in transformer.named_modules():
        if hasattr(module, "sampled"):  # quantized: these are the values of the file
            samples[f"{name}.weight"] = module.sampled
            del samples[f"{name}.scale"]
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
    together = torch.cat([samples[name].cpu() for name in sorted(samples)])
    digest.update(together.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
