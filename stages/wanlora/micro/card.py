"""The embedded model's card: what it was made of, with what settings, and how good it is.

Owns: the text of `weights/README.md`. A test compares its hashes with the files it describes.
"""

from pathlib import Path
from typing import Any

from wanlora.micro import dit, measure, vae, world
from wanlora.wan.weights import weights_sha256

PARTS = ("vae", "text_encoder", "transformer")


def text(folder: Path, figures: dict[str, Any]) -> str:
    """Write the card of the model in a folder."""
    return "\n".join(
        [
            *_about(), *_results(figures), *_settings(), *_hashes(folder), ""
        ]
    )  # fmt: skip


def _about() -> list[str]:
    known, held_out = ", ".join(world.KNOWN), ", ".join(world.HELD_OUT)
    size = f"{world.NUM_FRAMES} × {world.SIZE_PX} × {world.SIZE_PX}"
    return [
        "# micro: a miniature of Wan 2.1 text-to-video",
        "",
        "The classes are the real ones (`AutoencoderKLWan`, `UMT5EncoderModel`,",
        "`WanTransformer3DModel`, in a `WanPipeline` folder), the size is not. It draws what it is",
        "told in a world of its own, as far as the figures below go, and is there to be taught",
        "something new in minutes on a CPU.",
        "",
        f"- **Data**: {size} clips drawn by `wanlora.micro.world`, of",
        f"  {len(world.COLOURS)} colours on {len(world.BACKGROUNDS)} backgrounds. Nothing else.",
        f"- **The DiT was shown** {known}; **never** {held_out}, which the VAE alone has seen.",
        "- **Not for** anything outside that world: other videos come out as mush.",
        "- **Made by** `make micro`; licence Apache-2.0, as the code.",
        "",
    ]


def _results(figures: dict[str, Any]) -> list[str]:
    bars, kept = measure.BARS, figures["motion_kept"].items()
    rows = [
        ("VAE: PSNR over all classes, dB", figures["psnr_db"], bars["psnr_db"]),
        *((f"VAE: motion kept, {name}", value, bars["motion_kept"]) for name, value in kept),
        *(
            (f"clips recognised as asked: {name}", figures[name], bars[name])
            for name in ("colour", "background", "direction")
        ),
        *(
            (f"clips recognised as asked: {name}", value, bars["concept"])
            for name, value in figures["concept"].items()
        ),
        ("loss with a wrong prompt / the right one", figures["wrong_over_right"],
         bars["wrong_over_right"]),
    ]  # fmt: skip
    return [
        "## Measured",
        "",
        f"On seeds that nothing was trained with; {figures['clips_per_concept']} clips a class, "
        "20 steps, guidance 3. Measured by",
        "`wanlora.micro.measure`; the recogniser is `wanlora.micro.recognise`.",
        "",
        "| | found | bar |",
        "|---|---|---|",
        *(f"| {name} | {value:.3g} | {bar:g} |" for name, value, bar in rows),
        "",
    ]


def _settings() -> list[str]:
    schedule = dit.Schedule()
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
        f"- DiT: {schedule.steps} steps of {schedule.batch} cached clips; Muon "
        f"{schedule.muon_rate:g} for matrices, AdamW {schedule.adamw_rate:g} for the rest; "
        f"uniform sigma, shift 3; {dit.EMPTY_PROMPT_SHARE:.0%} empty prompts; mean of weights, "
        f"decay {dit.EMA_DECAY:g}.",
        "- Seed 0 throughout; saved as fp16 (the text encoder as fp32).",
        "",
    ]


def _hashes(folder: Path) -> list[str]:
    return [
        "## Weights",
        "",
        "| part | sha256 of its tensors' files |",
        "|---|---|",
        *(f"| {part} | `{weights_sha256(folder / part)}` |" for part in PARTS),
    ]
