"""FLOPs of a training step, counted from the transformer's shape.

Owns: the arithmetic of one clip's forward and backward pass. Counts the work of matrix units:
matrix products, attention and the patch convolution, with two FLOPs per multiply-add. The result
equals that of `torch.utils.flop_counter` with a fused attention kernel, whose backward pass is 2.5
forward passes (five products for two). Elementwise work is not counted.
Source of the shapes: diffusers WanTransformer3DModel.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from wanlora.core.buckets import PATCH

Recompute = Literal["none", "selective", "full", "offload"]
"""Part of a block that is recomputed in the backward pass: nothing; everything except attention,
whose output is kept; everything; everything, with the block's input in host memory meanwhile."""

Activations = Literal["auto", Recompute]
"""Setting of the blocks; auto recomputes as little as memory allows."""


@dataclass(frozen=True, slots=True)
class TransformerShape:
    """Fields of a WanTransformer3DModel's configuration that determine its FLOPs.

    The default values are those of every Wan 2.1 text-to-video model.

    Attributes:
        in_channels: Channels of the input: of the latents, and of the image condition and its mask
            in an image-to-video model.
        image_dim: Features of a token of the image encoder, if the transformer reads its output.
    """

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    text_dim: int
    in_channels: int = 16
    out_channels: int = 16
    image_dim: int | None = None
    freq_dim: int = 256
    num_text_tokens: int = 512

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_image_tokens(self) -> int:
        """Tokens of the image encoder's output: 16 x 16 patches and the class; 0 if not read."""
        return 257 if self.image_dim else 0


@dataclass(slots=True)
class Parts:
    """FLOPs by kind of work."""

    self_attention: float = 0.0
    cross_attention: float = 0.0
    frozen_linears: float = 0.0
    lora: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.self_attention + self.cross_attention + self.frozen_linears + self.lora

    def since(self, before: "Parts") -> "Parts":
        """Return the difference to an earlier count."""
        return Parts(
            self.self_attention - before.self_attention,
            self.cross_attention - before.cross_attention,
            self.frozen_linears - before.frozen_linears,
            self.lora - before.lora,
        )


@dataclass(slots=True)
class StepFlops:
    """FLOPs of one clip in one training step.

    Attributes:
        forward: The forward pass.
        backward: The backward pass, without recomputation.
        recompute: Work that gradient checkpointing repeats.
    """

    forward: Parts = field(default_factory=Parts)
    backward: Parts = field(default_factory=Parts)
    recompute: float = 0.0

    @property
    def model(self) -> float:
        """FLOPs that the mathematics needs: forward and backward. MFU counts only these."""
        return self.forward.total + self.backward.total

    @property
    def total(self) -> float:
        """FLOPs that are computed, including recomputation."""
        return self.model + self.recompute


def step_flops(
    shape: TransformerShape,
    num_tokens: int,
    *,
    rank: int,
    adapted: Collection[str],
    recompute: Recompute | Sequence[Recompute] = "none",
) -> StepFlops:
    """Count one clip's training step.

    A frozen linear of T tokens costs 2 T in out forward, and as much backward if its input depends
    on anything trained. A LoRA costs 2 T r (in + out) forward; backward that for the gradients of A
    and B, 2 T r out between them, and 2 T r in if its input needs a gradient. Attention of Q
    queries on K keys of width d costs 4 Q K d forward and 10 Q K d backward.

    Args:
        shape: The transformer.
        num_tokens: Tokens of the clip (`buckets.num_tokens`).
        rank: Rank of the LoRA.
        adapted: Names of the adapted modules, for example `blocks.0.attn1.to_q`.
        recompute: One mode for all blocks, or one per block.
    """
    counter = _Counter(shape, num_tokens, rank, frozenset(adapted))
    counter.model()
    modes = [recompute] * shape.num_layers if isinstance(recompute, str) else recompute
    counter.step.recompute = sum(
        _again(block, mode) for block, mode in zip(counter.blocks, modes, strict=True)
    )
    return counter.step


def _again(block: Parts, mode: Recompute) -> float:
    """FLOPs of a block's forward pass that the backward pass repeats."""
    if mode == "none":
        return 0.0
    attention = block.self_attention + block.cross_attention
    return block.total - (attention if mode == "selective" else 0.0)


class _Counter:
    """Counts the forward pass once, and tracks which values need a gradient."""

    def __init__(
        self, shape: TransformerShape, num_tokens: int, rank: int, adapted: frozenset[str]
    ) -> None:
        self.shape, self.num_tokens, self.rank, self.adapted = shape, num_tokens, rank, adapted
        self.step = StepFlops()
        self.blocks: list[Parts] = []

    def model(self) -> None:
        shape, width = self.shape, self.shape.width
        patch = math.prod(PATCH)
        # The patch convolution and its input need no gradient.
        self.step.forward.frozen_linears += (
            2.0 * self.num_tokens * shape.in_channels * patch * width
        )

        condition = "condition_embedder"
        time = self.linear(f"{condition}.time_embedder.linear_1", 1, shape.freq_dim, width, False)
        time = self.linear(f"{condition}.time_embedder.linear_2", 1, width, width, time)
        modulation = self.linear(f"{condition}.time_proj", 1, width, 6 * width, time)
        tokens = shape.num_text_tokens
        text = self.linear(
            f"{condition}.text_embedder.linear_1", tokens, shape.text_dim, width, False
        )
        text = self.linear(f"{condition}.text_embedder.linear_2", tokens, width, width, text)
        image = False
        if shape.image_dim:
            embedder, size = f"{condition}.image_embedder.ff.net", shape.image_dim
            tokens = shape.num_image_tokens
            image = self.linear(f"{embedder}.0.proj", tokens, size, size, False)
            image = self.linear(f"{embedder}.2", tokens, size, width, image)

        hidden = False
        for index in range(shape.num_layers):
            before = replace(self.step.forward)
            hidden = self.block(f"blocks.{index}", hidden, modulation, text, image)
            self.blocks.append(self.step.forward.since(before))
        self.linear("proj_out", self.num_tokens, width, shape.out_channels * patch, hidden or time)

    def block(self, name: str, hidden: bool, modulation: bool, text: bool, image: bool) -> bool:
        # The concatenation of the two needs a gradient if either does.
        context = text or image
        tokens, width = self.num_tokens, self.shape.width
        hidden |= modulation  # scale and shift before, gate after
        hidden |= self.attention(f"{name}.attn1", hidden, hidden, tokens)
        hidden |= self.attention(f"{name}.attn2", hidden, context, self.shape.num_text_tokens)
        inner = self.linear(f"{name}.ffn.net.0.proj", tokens, width, self.shape.ffn_dim, hidden)
        return hidden | self.linear(f"{name}.ffn.net.2", tokens, self.shape.ffn_dim, width, inner)

    def attention(self, name: str, hidden: bool, context: bool, num_keys: int) -> bool:
        """Projections and attention; `attn1` attends to the clip, `attn2` to text and image."""
        tokens, width = self.num_tokens, self.shape.width
        query = self.linear(f"{name}.to_q", tokens, width, width, hidden)
        kind = "self_attention" if name.endswith("attn1") else "cross_attention"
        sources = [(num_keys, "to_k", "to_v")]
        if kind == "cross_attention" and self.shape.image_dim:
            sources.append((self.shape.num_image_tokens, "add_k_proj", "add_v_proj"))
        any_needed = False
        for number, to_key, to_value in sources:
            key = self.linear(f"{name}.{to_key}", number, width, width, context)
            value = self.linear(f"{name}.{to_value}", number, width, width, context)
            product = 2.0 * tokens * number * width
            _add(self.step.forward, kind, 2 * product)
            needed = query or key or value
            _add(self.step.backward, kind, 5 * product if needed else 0.0)
            any_needed |= needed
        return self.linear(f"{name}.to_out.0", tokens, width, width, any_needed)

    def linear(self, name: str, tokens: int, inputs: int, outputs: int, needed: bool) -> bool:
        """Count a linear module, and return whether its output needs a gradient."""
        cost = 2.0 * tokens * inputs * outputs
        self.step.forward.frozen_linears += cost
        self.step.backward.frozen_linears += cost if needed else 0.0
        if name not in self.adapted:
            return needed
        down, up = 2.0 * tokens * inputs * self.rank, 2.0 * tokens * self.rank * outputs
        self.step.forward.lora += down + up
        self.step.backward.lora += 2 * up + down + (down if needed else 0.0)
        return True


def _add(parts: Parts, name: str, flops: float) -> None:
    setattr(parts, name, getattr(parts, name) + flops)
