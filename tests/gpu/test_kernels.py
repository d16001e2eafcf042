"""Attention kernels: the gradient of each, and that the pinned one runs."""

import pytest
import torch

from tests.support import real_size
from wanlora.core.buckets import Bucket
from wanlora.cost.flops import TransformerShape
from wanlora.training.predict import predict
from wanlora.training.trial import random_batch
from wanlora.wan.attention import pinned, watched
from wanlora.wan.blocks import set_activations

KERNELS = {"cpu": ("flash",), "cuda": ("cudnn", "flash", "efficient")}
LENGTHS = {"cpu": (248, 256), "cuda": (1016, 1024, 3960)}
"""248, 1016 and 3960 are 120 mod 128, as the 32,760 tokens of 81x480x832."""
OPERATORS = {
    "cpu": {"flash": "_scaled_dot_product_flash_attention_for_cpu"},
    "cuda": {name: f"_scaled_dot_product_{name}_attention" for name in KERNELS["cuda"]},
}
ROUNDING = 2.0**-8
"""Relative rounding of bf16."""


def gradients(kernel, device, dtype, length, num_keys):
    """Output, and gradients of query, key and value at a head size of 128, on the same values."""
    draws = torch.Generator().manual_seed(0)

    def draw(tokens):
        values = torch.randn(1, 4, tokens, 128, generator=draws).bfloat16()
        return values.to(device, dtype).requires_grad_()

    query, key, value = draw(length), draw(num_keys), draw(num_keys)
    with pinned(kernel, device):
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        torch.autograd.backward((out * draw(length).detach()).sum())
    return [out.detach(), *(tensor.grad for tensor in (query, key, value))]


@pytest.mark.parametrize("num_keys", [None, 512], ids=["self", "cross"])
def test_the_gradient_of_each_kernel_is_that_of_math(device, num_keys):
    """Against the unfused kernel in float64 on the same bf16 values."""
    for length in LENGTHS[device.type]:
        keys = num_keys or length
        expected = gradients("math", device, torch.float64, length, keys)
        for kernel in KERNELS[device.type]:
            found = gradients(kernel, device, torch.bfloat16, length, keys)
            for wanted, got in zip(expected, found, strict=True):
                assert torch.isfinite(got).all(), (kernel, length)
                error = float((got.double() - wanted).norm() / wanted.norm())
                assert error < 4 * ROUNDING, (kernel, length, error)


def test_the_pinned_kernel_runs_forward_and_backward(device):
    """With full checkpointing, so that the backward pass computes attention again."""
    shape = TransformerShape(
        num_layers=2, num_attention_heads=2, attention_head_dim=128, ffn_dim=128, text_dim=32
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    transformer = real_size.transformer(shape, targets="attention", device=device, dtype=dtype)
    set_activations(transformer, ("full", "full"), compiled=False)
    batch = random_batch(Bucket(5, 64, 64), 1, num_channels=16, text_shape=(512, 32))
    for kernel in KERNELS[device.type]:
        with pinned(kernel, device), watched() as operators:
            prediction, _ = predict(transformer, batch, device, dtype)
            prediction.float().square().mean().backward()
        assert operators == {OPERATORS[device.type][kernel]}
