"""Plans for cards of 16 to 80 GB: the fastest one for each model and size of clips.

Owns: the cards, models and sizes of this table. Bytes are counted, seconds predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from wanlora.adapters import targets
from wanlora.core import units
from wanlora.core.buckets import Bucket
from wanlora.cost.gpus import GPUS
from wanlora.cost.memory import Quantize
from wanlora.cost.planning import fastest_plan
from wanlora.report.text_table import text_table
from wanlora.training.workload import budget_of_gpu, describe, workload
from wanlora.wan.variants import VARIANTS

CARDS = {16: "RTX 4080", 24: "RTX 4090", 32: "RTX 5090", 48: "L40S", 80: "H100"}
"""Cards by the GB in their name, whose rates the seconds are predicted with."""
MODELS = {"t2v-1.3b": "T2V-1.3B", "t2v-14b": "T2V-14B, or one expert of A14B"}
SIZES = (
    Bucket(17, 480, 832), Bucket(49, 480, 832), Bucket(81, 480, 832), Bucket(81, 720, 1280)
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CardFit:
    """The fastest plan of one clip per step on a card.

    Attributes:
        model: Name of the variant.
        clip: Frames, height and width.
        card_gb: GB in the card's name.
        gpu: Card that the seconds are for.
        fits: True if a plan fits; otherwise the other fields are of the one with least memory.
        quantize: Format of the frozen weights; int8 only if nothing fits without it.
        num_streamed: Blocks whose weights wait in host memory.
        activations: Recompute modes of the blocks.
        peak_gb: Memory of a step.
        seconds: Seconds of a step.
    """

    model: str
    clip: str
    card_gb: int
    gpu: str
    fits: bool
    quantize: Quantize
    num_streamed: int
    activations: str
    peak_gb: float
    seconds: float

    def how(self) -> str:
        """Format what the plan needs, as the values of the settings."""
        parts = [self.activations]
        parts += [self.quantize] if self.quantize != "none" else []
        parts += [f"{self.num_streamed} streamed"] if self.num_streamed else []
        return ", ".join(parts)


def fits_of_cards(*, rank: int, adapted: str | Sequence[str]) -> list[CardFit]:
    """Plan a step of one clip for each model, size and card, compiled.

    Args:
        rank: Rank of the adapter.
        adapted: Its targets.
    """
    return [
        _fit(model, clip, size_gb, rank, adapted)
        for model in MODELS
        for clip in SIZES
        for size_gb in CARDS
    ]


def _fit(
    model: str, clip: Bucket, card_gb: int, rank: int, adapted: str | Sequence[str]
) -> CardFit:
    variant, gpu = VARIANTS[model], GPUS[CARDS[card_gb]]
    linears = targets.linear_names(variant.shape.num_layers)
    plain = workload(
        variant, clip, batch_size=1, rank=rank, adapted=targets.match_targets(linears, adapted),
        compiled=True, element_bytes=2,
    )  # fmt: skip
    limit = budget_of_gpu(gpu.memory_bytes)
    formats: tuple[Quantize, ...] = ("none", "int8")
    for kind in formats:
        plan = fastest_plan(replace(plain, quantize=kind), limit, gpu)
        if plan.total_bytes <= limit:
            break
    return CardFit(
        model=model, clip=str(clip), card_gb=card_gb, gpu=CARDS[card_gb],
        fits=plan.total_bytes <= limit, quantize=kind, num_streamed=plan.num_streamed,
        activations=describe(plan.modes), peak_gb=plan.total_bytes / 1e9, seconds=plan.seconds,
    )  # fmt: skip


def table(fits: Sequence[CardFit]) -> list[str]:
    """Format the plans for a terminal: a table per model with one row per clip and card."""
    head = ("clip", "card", "time per step", "peak memory", "activations, quantize, stream-blocks")
    lines: list[str] = []
    for model, name in MODELS.items():
        rows, above = [], ""
        for fit in fits:
            if fit.model != model:
                continue
            rows.append((
                "" if fit.clip == above else fit.clip,
                f"{fit.card_gb} GB, {fit.gpu}",
                units.duration(fit.seconds) if fit.fits else "does not fit",
                units.size(1e9 * fit.peak_gb),
                fit.how() if fit.fits else "",
            ))  # fmt: skip
            above = fit.clip
        lines += ["", name, *text_table(head, rows)[1:]]
    return lines


def markdown(fits: Sequence[CardFit]) -> str:
    """Format the plans for docs/performance.md: one row per model and clip, a column per card."""
    head = ["model", "clip", *(f"{size} GB, {name}" for size, name in CARDS.items())]
    rows = [
        [MODELS[model], str(clip), *(
            f"{units.duration(fit.seconds)}: {fit.how()}"
            if fit.fits
            else f"no ({units.size(1e9 * fit.peak_gb)})"
            for fit in fits
            if (fit.model, fit.clip) == (model, str(clip))
        )]
        for model in MODELS
        for clip in SIZES
    ]  # fmt: skip
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
