"""Check of an attention kernel: its output and gradients against unfused attention in fp32.

Owns: the cases, their values and the tolerance. `kernel_probe` chooses among kernels. Legend:
B clips, N tokens, M keys, H heads, D width of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from wanlora.core import units
from wanlora.wan import attention

MAX_ERROR = 0.02
"""Largest relative error (L2) of an output or a gradient. bf16 rounds at 0.4 %."""
CHECKED_TOKENS = 1152
"""Largest length of the check; a multiple of the 128 tokens that kernels compute at once."""
_TILE = 128
_CHECKED_CLIPS = 2
_CPU_FLOPS = 2e9
"""Work of a timed pass on other devices than CUDA: at most about a second."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Attention of a run.

    Attributes:
        num_tokens: Tokens per clip of the largest bucket.
        other_tokens: Tokens per clip of other buckets.
        batch_size: Clips per micro-batch of the largest bucket.
        num_heads: Heads.
        head_dim: Width of a head.
        num_text_tokens: Keys of cross-attention to a prompt.
        dtype: The transformer's type.
        device: Device to compute on.
        num_image_tokens: Keys of cross-attention to an image; 0 without one.
    """

    num_tokens: int
    other_tokens: frozenset[int]
    batch_size: int
    num_heads: int
    head_dim: int
    num_text_tokens: int
    dtype: torch.dtype
    device: torch.device
    num_image_tokens: int = 0

    @property
    def timed_tokens(self) -> int:
        """Tokens of the timed pass: the largest bucket's; fewer if there is no CUDA."""
        if self.device.type == "cuda":
            return self.num_tokens
        # Two products of 2 N^2 D FLOPs per head forward, five backward.
        per_pair = 14 * self.batch_size * self.num_heads * self.head_dim
        return shorter(self.num_tokens, max(_TILE, int((_CPU_FLOPS / per_pair) ** 0.5)))


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of query `B H N D` with key and value `B H M D`."""


def shorter(tokens: int, limit: int) -> int:
    """Largest length up to a limit with the same remainder mod 128; a kernel's edge cases too."""
    return tokens - max(0, -(-(tokens - limit) // _TILE)) * _TILE


class Case(NamedTuple):
    """Attention whose result is known: inputs, the gradient of the output, and the expected values.

    Attributes:
        inputs: Query, key and value.
        upstream: Gradient of the output.
        expected: Output and gradients of the inputs in fp32.
    """

    inputs: tuple[Tensor, Tensor, Tensor]
    upstream: Tensor
    expected: tuple[Tensor, ...]


_RESULTS = ("output", "gradient of the query", "gradient of the key", "gradient of the value")


def make_cases(shape: AttentionShape) -> Iterator[Case]:
    """Self- and cross-attention of all lengths, in fp32 without a fused kernel."""
    attend = torch.nn.functional.scaled_dot_product_attention
    lengths = {shape.num_tokens, *shape.other_tokens}
    for tokens in sorted({shorter(number, CHECKED_TOKENS) for number in lengths}):
        for num_keys in filter(None, (tokens, shape.num_text_tokens, shape.num_image_tokens)):
            inputs, upstream = draw_inputs(
                shape, tokens, num_keys, batch_size=min(shape.batch_size, _CHECKED_CLIPS)
            )
            exact = [
                each.detach().float().requires_grad_(each.requires_grad)
                for each in (*inputs, upstream)
            ]
            with attention.pinned("math", shape.device):
                expected = both_passes(attend, (exact[0], exact[1], exact[2]), exact[3])
            yield Case(inputs, upstream, expected)


def draw_inputs(
    shape: AttentionShape, num_tokens: int, num_keys: int, *, batch_size: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Draw normal query, key, value and upstream gradient: `B H N D` views of `B N H D` tensors.

    That is diffusers' layout, and the values have about its scale: queries and keys are normalised.
    They are drawn on the device: a CPU would take seconds for each kernel at the run's size.
    """
    draws = torch.Generator(shape.device).manual_seed(0)

    def draw(number: int) -> Float[Tensor, "b h n d"]:
        size = (batch_size, number, shape.num_heads, shape.head_dim)
        values = torch.randn(size, generator=draws, device=shape.device)
        return values.to(shape.dtype).transpose(1, 2)

    query, key, value = (draw(n).requires_grad_() for n in (num_tokens, num_keys, num_keys))
    return (query, key, value), draw(num_tokens)


def both_passes(
    attend: Attend, inputs: tuple[Tensor, Tensor, Tensor], upstream: Tensor
) -> tuple[Tensor, ...]:
    """Output of attention, and gradients of query, key and value."""
    output = attend(*inputs)
    return (output.detach(), *torch.autograd.grad(output, inputs, upstream))


def first_difference(attend: Attend, cases: Sequence[Case], *, deterministic: bool) -> str | None:
    """Compare with the expected values; return the first difference."""
    for case in cases:
        found = both_passes(attend, case.inputs, case.upstream)
        query, key, _ = case.inputs
        where = f"for {query.shape[2]} tokens and {key.shape[2]} keys"
        for name, value, expected in zip(_RESULTS, found, case.expected, strict=True):
            if not torch.isfinite(value).all():
                return f"its {name} {where} is not finite"
            error = float((value.float() - expected).norm() / expected.norm())
            if not error < MAX_ERROR:
                return f"its {name} {where} is {units.percent(error)} off"
        again = both_passes(attend, case.inputs, case.upstream) if deterministic else found
        if not all(map(torch.equal, found, again)):
            return f"its gradients {where} differ between two passes"
    return None
