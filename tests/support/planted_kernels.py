"""Attention kernels that are right forward and have gradients that are not."""

from contextlib import nullcontext

import torch
from torch.nn.functional import scaled_dot_product_attention

from wanlora.training.kernel_probe import Candidate


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, change):
        ctx.change = change
        ctx.save_for_backward(query, key, value)
        return scaled_dot_product_attention(query, key, value)

    @staticmethod
    def backward(ctx, upstream):
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            output = scaled_dot_product_attention(*inputs)
        return *ctx.change(*torch.autograd.grad(output, inputs, upstream)), None


def planted(change, name="planted"):
    """Candidate whose gradients of query, key and value are those that `change` returns."""
    return Candidate(
        name, nullcontext,
        lambda query, key, value: _WithGradients.apply(query, key, value, change),
    )  # fmt: skip
