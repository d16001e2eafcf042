"""The low-rank update of each module, the same for every format of adapter files.

Owns: rank, alpha and scale of each module from an adapter's metadata, and the arithmetic of updates
kept as factors: norms and differences without a matrix of the module's size.

Legend: A is `rank in`, B is `out rank`; the update is dW = scale B A, with scale = alpha / rank, or
alpha / sqrt(rank) with rsLoRA. DoRA: W' = m (W + dW) / |W + dW|, row by row.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

PREFIX = "transformer."


@dataclass(frozen=True, slots=True)
class Update:
    """One module's update: scale B A.

    Attributes:
        a: Matrix A, `rank in`.
        b: Matrix B, `out rank`.
        scale: Factor of the product.
        magnitude: DoRA's m, one number per row; None for plain LoRA.
    """

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]
    scale: float
    magnitude: Float[Tensor, " out"] | None = None

    @property
    def rank(self) -> int:
        """Rank r."""
        return int(self.a.shape[0])

    @property
    def num_parameters(self) -> int:
        """Numbers in it."""
        extra = 0 if self.magnitude is None else self.magnitude.numel()
        return self.a.numel() + self.b.numel() + extra

    def is_finite(self) -> bool:
        """True if there is no NaN and no infinity."""
        parts = (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)
        return all(bool(torch.isfinite(part).all()) for part in parts)


def updates_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Update]:
    """Group an adapter's tensors by module, each with its scale, as peft reads its metadata.

    Args:
        tensors: By name, `blocks.0.attn1.to_q.lora_A.weight`.
        metadata: PEFT settings with their prefix, complete.
    """
    found = {}
    for module in sorted({name.partition(".lora_")[0] for name in tensors}):
        a = tensors[f"{module}.lora_A.weight"]
        b = tensors[f"{module}.lora_B.weight"]
        magnitude = tensors.get(f"{module}.lora_magnitude_vector")
        rslora = bool(metadata.get(f"{PREFIX}use_rslora"))
        scale = scale_of(alpha_of(module, metadata), int(a.shape[0]), rslora=rslora)
        found[module] = Update(a, b, scale, magnitude)
    return found


def alpha_of(module: str, metadata: Mapping[str, Any]) -> float:
    """Find a module's alpha: its own by `alpha_pattern`, or the adapter's."""
    return float(_setting("alpha_pattern", "lora_alpha", module, metadata))


def rank_of(module: str, metadata: Mapping[str, Any]) -> int:
    """Find a module's rank: its own by `rank_pattern`, or the adapter's."""
    return int(_setting("rank_pattern", "r", module, metadata))


def scale_of(alpha: float, rank: int, *, rslora: bool) -> float:
    """Compute alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def _setting(pattern: str, default: str, module: str, metadata: Mapping[str, Any]) -> Any:
    own = metadata.get(f"{PREFIX}{pattern}") or {}
    return own.get(pattern_of(module, list(own)), metadata[f"{PREFIX}{default}"])


def pattern_of(module: str, patterns: Sequence[str]) -> str:
    """Select the first pattern that matches a module, as peft does; without one, the module."""
    if not patterns:
        return module
    from peft.utils.other import get_pattern_key  # noqa: PLC0415  (seconds, and rarely needed)

    return str(get_pattern_key(patterns, module))


def folded(b: Float[Tensor, "out rank"], scale: float) -> Float[Tensor, "out rank"]:
    """Multiply the scale into B, in fp32; a power of two is exact, any other rounds once."""
    return b if scale == 1 else (b.double() * scale).float()


def norm(update: Update) -> float:
    """Frobenius norm of scale B A: sqrt(trace(BᵀB AAᵀ)), in float64."""
    return abs(update.scale) * _norm(update.b.double(), update.a.double())


def relative_error(found: Update, expected: Update) -> float:
    """Frobenius norm of (found - expected) over that of expected; exactly 0 for equal updates.

    From s B A - s'B'A' = (s B - t s'B') A + t s'B' (A - A'/t) with t = |A'| / |A|, so that a scale
    that moved from B to A cancels before anything is subtracted. DoRA magnitudes count too.
    """
    if _is_same(found, expected):
        return 0.0
    a, other_a = expected.a.double(), found.a.double()
    b, other_b = expected.b.double() * expected.scale, found.b.double() * found.scale
    t = float(other_a.norm() / a.norm()) if a.any() and other_a.any() else 1.0
    left = torch.cat([b - t * other_b, t * other_b], dim=1)
    right = torch.cat([a, a - other_a / t])
    size = _norm(b, a)
    error = _norm(left, right) / size if size else float(_norm(other_b, other_a) > 0)
    return max(error, _magnitude_error(found.magnitude, expected.magnitude))


def dense(update: Update) -> Float64[Tensor, "out in"]:
    """Multiply out scale B A, in float64."""
    return update.scale * (update.b.double() @ update.a.double())


def _is_same(found: Update, expected: Update) -> bool:
    return (
        found.scale == expected.scale
        and torch.equal(found.a, expected.a)
        and torch.equal(found.b, expected.b)
        and _magnitude_error(found.magnitude, expected.magnitude) == 0
    )


def _norm(b: Tensor, a: Tensor) -> float:
    return math.sqrt(max(float(((b.mT @ b) * (a @ a.mT)).sum()), 0.0))


def _magnitude_error(found: Tensor | None, expected: Tensor | None) -> float:
    if found is None and expected is None:
        return 0.0
    if found is None or expected is None:
        return math.inf
    wanted = expected.double()
    return float((found.double() - wanted).norm() / wanted.norm())
