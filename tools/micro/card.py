"""Write the embedded model's card: its data, settings and measured quality.

Owns: the text of `weights/README.md`. A test compares its hashes with the files it describes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.micro import dit, measure, vae
from wanlora.micro import world
from wanlora.wan.weights import weights_sha256

PARTS = ("vae", "text_encoder", "transformer")


def text(folder: Path, figures: dict[str, Any]) -> str:
    """Write the card of the model in a folder."""
    return "\n".join(
        [
            *_about(), *_results(figures), *_settings(), *hashes(folder, PARTS), ""
        ]
    )  # fmt: skip


def _about() -> list[str]:
    known, held_out = ", ".join(world.KNOWN), ", ".join(world.HELD_OUT)
    size = f"{world.NUM_FRAMES} × {world.SIZE_PX} × {world.SIZE_PX}"
    return [
        "# micro: a miniature of Wan 2.1 text-to-video",
        "",
        "The classes are those of the real model (`AutoencoderKLWan`, `UMT5EncoderModel`,",
        "`WanTransformer3DModel`, in a `WanPipeline` folder), at a small size. It generates clips",
        "of a small drawn world from captions, with the quality measured below, and can be",
        "fine-tuned in minutes on a CPU.",
        "",
        f"- **Data**: {size} clips drawn by `wanlora.micro.world`, of",
        f"  {len(world.COLOURS)} colours on {len(world.BACKGROUNDS)} backgrounds. Nothing else.",
        f"- **The DiT was trained on** {known}; **not** on {held_out}.",
        "  The VAE was trained on all of them.",
        "- **Not for** anything outside that world: its results on other videos mean nothing.",
        "- **Made by** `make micro`; licence Apache-2.0, as the code.",
        "",
    ]


def _results(figures: dict[str, Any]) -> list[str]:
    bars, kept = measure.BARS, figures["motion_kept"].items()
    ceiling = figures["vae_shape"].items()
    rows = [
        ("VAE: PSNR over all classes, dB", figures["psnr_db"], bars["psnr_db"]),
        *((f"VAE: motion kept, {name}", value, bars["motion_kept"]) for name, value in kept),
        *((f"VAE: shape score, median: {name}", value, None) for name, value in ceiling),
        *(
            (f"clips that match the prompt: {name}", figures[name], bars[name])
            for name in ("colour", "background", "direction")
        ),
        *(
            (f"clips that match the prompt: {name}", value, bars["concept"])
            for name, value in figures["concept"].items()
        ),
        *(
            (f"shape score, median: {name}", value, bars["shape"])
            for name, value in figures["shape"].items()
        ),
        ("loss with a wrong prompt / the right one", figures["wrong_over_right"],
         bars["wrong_over_right"]),
    ]  # fmt: skip
    return [
        "## Measured",
        "",
        f"On seeds that were not used in training; {figures['clips_per_concept']} clips per class, "
        "20 steps, guidance 3. Measured by",
        "`tools.micro.measure`; the recogniser is `wanlora.micro.recognise`. The shape score",
        "(`tools.micro.shape`) is the intersection over union of a frame's silhouette with the",
        "nearest drawn one, over position, moment and size. The VAE's rows are for drawn clips",
        "that were only encoded and decoded: the maximum for the DiT.",
        "",
        *measured_table(rows),
        "",
    ]


def measured_table(rows: Sequence[tuple[str, float, float | None]]) -> list[str]:
    """Lines of a table of figures.

    Args:
        rows: Name, value and minimum of each; None = it has no minimum.
    """
    return [
        "| | measured | minimum |",
        "|---|---|---|",
        *(
            f"| {name} | {value:.3g} | {'' if bar is None else format(bar, 'g')} |"
            for name, value, bar in rows
        ),
    ]


def _settings() -> list[str]:
    stages = [
        f"{stage.steps} steps of {stage.batch} out of {stage.clips_per_concept} clips a class, "
        f"Muon {stage.muon_rate:g} for matrices, AdamW {stage.adamw_rate:g} for the rest, flat "
        f"for {stage.flat_share:.0%}, then a cosine, mean of weights with decay {stage.ema_decay:g}"
        for stage in dit.STAGES
    ]
    phases = "; ".join(
        f"{phase.steps} steps of {phase.batch} × {phase.num_frames} × {phase.size_px}²"
        for phase in vae.SCHEDULE.phases
    )
    return [
        "## Settings",
        "",
        f"- VAE: {phases}; Muon {vae.SCHEDULE.muon_rate:g} for convolutions, AdamW "
        f"{vae.SCHEDULE.adamw_rate:g} for the rest, one cosine, bf16; KL {vae.KL_WEIGHT:g}.",
        "- Text encoder: random, not trained.",
        f"- DiT: {'; then '.join(stages)}; uniform sigma, shift 3; "
        f"{dit.EMPTY_PROMPT_SHARE:.0%} empty prompts.",
        "- Seed 0 (1 for the second stage of the DiT); saved as fp16 (the text encoder as fp32).",
        "",
    ]


def hashes(folder: Path, parts: Sequence[str]) -> list[str]:
    """Lines of the section with the hash of each part's weights.

    Args:
        folder: Folder of the model.
        parts: Sub-folders.
    """
    return [
        "## Weights",
        "",
        "| part | sha256 of its tensors' files |",
        "|---|---|",
        *(f"| {part} | `{weights_sha256(folder / part)}` |" for part in parts),
    ]
