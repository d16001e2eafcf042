"""Frozen weights of the transformer's blocks in 8 bits: half the memory of bfloat16.

Owns: the two formats, the layer that computes with them, and the replacement of a block's linear
layers. Norms, embeddings, modulation and head keep their types, and adapters are added as to any
linear layer. Must not know: files, adapters.

A weight W of shape `out_features in_features` is stored as 8-bit values Q and one scale per row s:
W is about s * Q. int8: s = max |W| / 127, Q rounded to the nearest integer. fp8 (e4m3): s = max |W|
/ 448, Q rounded to the nearest e4m3 value.
"""

from typing import Any, TypeGuard

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from wanlora.cost.memory import Quantize
from wanlora.errors import DeviceError
from wanlora.wan.base_fingerprint import sampled_values

_LARGEST = {"int8": 127.0, "fp8": 448.0}
"""Largest value of each format."""
_SMALLEST = 1e-12
"""Smallest scale: that of a row of zeros."""
_ROWS_AT_ONCE = 512
"""Rows that are rounded at once: their copies in fp32 are small beside the result."""


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight has 8 bits per value; the product is computed in `dtype`.

    The weight is converted back to `dtype` for each product, forward and backward, so autograd
    keeps 8-bit weights only. All tensors are plain parameters: they can be moved and copied.

    Args:
        weight: Its weight, `out_features in_features`.
        bias: Its bias; None without one.
        kind: Format of the weight.

    Attributes:
        sampled: Values of the weight before it was rounded, for `base_fingerprint`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: Quantize) -> None:
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, bias=False, device="meta", dtype=weight.dtype)
        self.kind = kind
        self.sampled = sampled_values(weight)
        values, scale = quantized(weight, kind)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of the product; peft gives it to the adapters of this layer."""
        return self.scale.dtype

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name)
        """Compute x W^T + b."""
        arguments = (input, self.weight, self.scale, self.bias, self.kind)
        # Typed from torch 2.15 on.
        result: Tensor = _Product.apply(*arguments)  # type: ignore[no-untyped-call, unused-ignore]
        return result


class _Product(torch.autograd.Function):
    """x W^T + b, with the gradient of x only. Keeps the 8-bit values for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scale: Tensor, bias: Any, kind: Any) -> Tensor:
        ctx.save_for_backward(values, scale)
        ctx.kind = kind
        return nn.functional.linear(x, dequantized(values, scale, kind), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, scale = ctx.saved_tensors
        # Transposed before and after. The same operators as in the forward pass would be one node
        # of a compiled graph, which torch's partitioner keeps in 16 bits from forward to backward.
        weight = dequantized(values.t(), scale.t(), ctx.kind).t()
        return gradients[0] @ weight, None, None, None, None


def require_compilable(kind: Quantize, device: torch.device) -> None:
    """Check that blocks in a format can be compiled for a device.

    Args:
        kind: The format.
        device: Device that computes.

    Raises:
        DeviceError: Triton has no e4m3 type for this GPU
            (https://github.com/pytorch/pytorch/issues/167082).
    """
    if kind != "fp8" or device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise DeviceError(
            "--quantize fp8 in compiled blocks needs a GPU of compute capability 8.9 or newer, and "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}: use --quantize int8, which "
            "has the same size and smaller errors, or --eager"
        )


def quantized(
    weight: Float[Tensor, "out in"], kind: Quantize
) -> tuple[Int8[Tensor, "out in"], Float[Tensor, "out 1"]]:
    """Round a weight to 8 bits per value.

    Args:
        weight: The weight.
        kind: The format.

    Returns:
        The values, and one scale per row in the weight's type. The bits of fp8 values are returned
        as int8: libraries would take them for a type to compute in.
    """
    largest = _LARGEST[kind]
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty((len(weight), 1), dtype=weight.dtype, device=weight.device)
    for first in range(0, len(weight), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        part = weight[rows].float()
        scale[rows] = (part.abs().amax(dim=1, keepdim=True) / largest).clamp(min=_SMALLEST)
        # Divided by the scale as it is stored, so that its own rounding leaves no error.
        part = (part / scale[rows].float()).clamp(-largest, largest)
        values[rows] = (
            part.round().to(torch.int8)
            if kind == "int8"
            else part.to(torch.float8_e4m3fn).view(torch.int8)
        )
    return values, scale


def dequantized(
    values: Int8[Tensor, "out in"], scale: Float[Tensor, "#out #in"], kind: Quantize
) -> Float[Tensor, "out in"]:
    """Convert a weight back, or its transpose: s * Q, rounded once."""
    if kind == "fp8":
        values = values.view(torch.float8_e4m3fn)
    return values.to(scale.dtype).mul_(scale)


def is_quantized(module: nn.Module, name: str) -> TypeGuard[nn.Linear]:
    """Return whether a module of a transformer is one that is replaced: a linear layer of a block.

    Args:
        module: The module.
        name: Its name in the transformer.
    """
    return name.startswith("blocks.") and isinstance(module, nn.Linear)


def quantize_blocks(transformer: nn.Module, kind: Quantize) -> None:
    """Replace the linear layers of the blocks, one after the other.

    Args:
        transformer: Transformer without adapters.
        kind: Format; "none" changes nothing.
    """
    if kind == "none":
        return
    for name, module in list(transformer.named_modules()):
        if is_quantized(module, name):
            put(transformer, name, QuantizedLinear(module.weight.detach(), module.bias, kind))


def put(transformer: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module of a name."""
    parent, _, own = name.rpartition(".")
    setattr(transformer.get_submodule(parent), own, module)
