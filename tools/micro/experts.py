"""Fine-tune the embedded model's DiT for each range of sigmas: the two experts of micro-a14b.

Owns: the order of the steps: latents, both experts, their losses and the card. After an
interruption, the same command continues: `python -m tools.micro.experts --work-dir outputs/experts`
"""

import argparse
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from jaxtyping import Float

from tools.micro import dit, models
from tools.micro.measure import FIRST_SEED
from tools.micro.models import ROW
from wanlora.core.intervals import describe_change, mean_interval
from wanlora.core.rng import Stream, normal
from wanlora.files import partial_path, write_atomic
from wanlora.micro import world
from wanlora.training import flow
from wanlora.wan.encoders import load_text_encoder, load_vae
from wanlora.wan.model_folder import MICRO, PIPELINE, resolve
from wanlora.wan.transformer import load_transformer
from wanlora.wan.weights import weights_sha256

logger = logging.getLogger(__name__)

Expert = Literal["high", "low"]
Table = Float[np.ndarray, "n q"]

CPU = torch.device("cpu")
OUTPUT = Path(__file__).parents[2] / "tests" / "fixtures" / "micro-a14b"
SUBFOLDERS: dict[Expert, str] = {"high": "transformer", "low": "transformer_2"}
BOUNDARY = 0.875
"""The high-noise expert is for sigma >= 0.875, the low-noise expert for lower sigmas."""

RANGES: dict[Expert, tuple[float, float]] = {"high": (BOUNDARY, 1.0), "low": (0.0, BOUNDARY)}
_AT_BOUNDARY = flow.shift_sigma(BOUNDARY, 1 / ROW.defaults.shift)
QUANTILES: dict[Expert, tuple[float, float]] = {
    "high": (_AT_BOUNDARY, 1.0),
    "low": (0.0, _AT_BOUNDARY),
}
"""Part of the density of pretraining (uniform, shift 3) of each expert: 30 % and 70 %."""

STAGE = dit.Stage(192, 160, 24, 5e-4, 2e-4, 0.2, 0.97)
FIRST_CLIP = max(stage.clips_per_concept for stage in dit.STAGES)
"""Seed of the first clip: pretraining has not seen it or any later one."""

MEASURED_PER_CONCEPT, NUM_SIGMAS = 16, 8


def run(work_dir: Path, output: Path) -> None:
    """Train the experts that are not trained yet, then measure both and write the card."""
    work_dir.mkdir(parents=True, exist_ok=True)
    folder = resolve(MICRO, PIPELINE)
    clips = cached_clips(folder, work_dir / "latents.pt", range(STAGE.clips_per_concept))
    for seed, expert in enumerate(SUBFOLDERS):
        transformer = _trainable(folder)
        checkpoint = work_dir / f"{expert}.pt"
        trained = dit.train(transformer, clips, STAGE, checkpoint, seed, QUANTILES[expert])
        models.save_rounded(trained, output / SUBFOLDERS[expert])
        shutil.copy(folder / "transformer" / "config.json", output / SUBFOLDERS[expert])
    write_atomic(output / "README.md", card(output, measure(folder, output, work_dir)).encode())


def _trainable(folder: Path) -> WanTransformer3DModel:
    transformer = load_transformer(folder, dtype=torch.float32, device=CPU)
    dit.shorten_text(transformer)
    return transformer.train().requires_grad_(requires_grad=True)


def cached_clips(
    folder: Path, path: Path, seeds: Sequence[int], first: int = FIRST_CLIP
) -> dit.Clips:
    """Encode clips of every known concept with the embedded model's encoders, once."""
    vae = load_vae(folder, dtype=torch.float32, device=CPU, tf32=True)
    text = load_text_encoder(folder, dtype=torch.float32, device=CPU)
    chosen = [first + seed for seed in seeds]
    if not path.exists():
        temporary = partial_path(path)
        torch.save(dit.raw_latents(vae, world.KNOWN, chosen), temporary)
        temporary.replace(path)
    raw = torch.load(path, weights_only=True)
    mean, std = (
        torch.tensor(row).view(1, -1, 1, 1, 1)
        for row in (ROW.vae.latents_mean, ROW.vae.latents_std)
    )
    captions = [world.scene(concept, seed).caption for concept in world.KNOWN for seed in chosen]
    return dit.Clips((raw - mean) / std, dit.embed(text, captions), dit.embed(text, [""])[0])


def measure(micro: Path, output: Path, work_dir: Path) -> dict[str, dict[str, Table]]:
    """Loss of micro and of both experts on held-out clips, in the range of each expert."""
    clips = cached_clips(micro, work_dir / "held-out.pt", range(MEASURED_PER_CONCEPT), FIRST_SEED)
    parts = {"micro": micro / "transformer"}
    parts |= {expert: output / name for expert, name in SUBFOLDERS.items()}
    tables: dict[str, dict[str, Table]] = {}
    for name, part in parts.items():
        transformer = WanTransformer3DModel.from_pretrained(part, dtype=torch.float32).eval()
        dit.shorten_text(transformer)
        tables[name] = {
            expert: losses(transformer, clips, quantiles) for expert, quantiles in QUANTILES.items()
        }
    return tables


@torch.no_grad()
def losses(
    transformer: WanTransformer3DModel, clips: dit.Clips, quantiles: tuple[float, float]
) -> Table:
    """Loss of each clip at the midpoints of equal shares of a part of the density."""
    low, high = quantiles
    columns = []
    for number in range(NUM_SIGMAS):
        sigma = flow.shift_sigma(
            low + (high - low) * (number + 0.5) / NUM_SIGMAS, ROW.defaults.shift
        )
        shape = tuple(clips.latents.shape)
        noise = torch.from_numpy(normal(0, Stream.VALIDATION, 0, number, shape))
        sigmas = torch.full((len(noise),), sigma)
        columns.append(dit.loss_at(transformer, clips.latents, clips.prompt_embeds, noise, sigmas))
    return torch.stack(columns, dim=1).double().numpy()


def card(output: Path, tables: Mapping[str, Mapping[str, Table]]) -> str:
    """Write the README of the pair: what it is, how it was made, and its losses against micro."""
    rows = []
    for expert in SUBFOLDERS:
        for part in QUANTILES:
            base, own = tables["micro"][part], tables[expert][part]
            found = mean_interval((own - base).mean(axis=1), [str(n) for n in range(len(own))])
            change = describe_change(found.mean, base.mean(), found.ci95)
            rows.append(f"| {expert} | {part} | {base.mean():.4f} | {own.mean():.4f} | {change} |")
    num_clips = MEASURED_PER_CONCEPT * len(world.KNOWN)
    return "\n".join([
        "# micro-a14b: two experts for tests",
        "",
        "The embedded micro model's DiT, fine-tuned once for sigma >= 0.875 (`transformer`, the",
        "high-noise expert) and once for sigma < 0.875 (`transformer_2`, the low-noise expert), as",
        "Wan2.2's T2V-A14B has two. `tests.support.experts.pair_folder` adds micro's encoders.",
        "",
        "- **Made by** `make micro-experts`: on micro's own classes of clips, from seeds that its",
        f"  pretraining has not seen; {STAGE.steps} steps of {STAGE.batch} out of "
        f"{STAGE.clips_per_concept} clips per class, Muon",
        f"  {STAGE.muon_rate:g} for matrices, AdamW {STAGE.adamw_rate:g} for the rest, mean of "
        f"weights with decay {STAGE.ema_decay:g};",
        "  uniform sigma with shift 3, of which each expert gets its part. Saved as fp16.",
        "- Licence Apache-2.0, as the code.",
        "",
        "## Measured",
        "",
        f"Loss on {num_clips} clips of seeds that nothing was trained with, at {NUM_SIGMAS} noise "
        "levels of each",
        "range, against micro on the same clips, noise levels and noise; with 95 % intervals over",
        "the clips.",
        "",
        "| expert | range | loss of micro | loss of the expert | paired change |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "## Weights",
        "",
        "| expert | folder | sha256 |",
        "|---|---|---|",
        *(
            f"| {expert} | {name} | `{weights_sha256(output / name)}` |"
            for expert, name in SUBFOLDERS.items()
        ),
        "",
    ])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(description="Fine-tune the embedded model into two experts.")
    parser.add_argument("--work-dir", type=Path, required=True, help="checkpoints and latents")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the two experts")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run(given.work_dir, given.output)


if __name__ == "__main__":
    main()
