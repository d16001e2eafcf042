"""Train the embedded model from random weights: `make micro`.

Owns: the order of the steps: VAE, latents, DiT, folder, figures, card. After an interruption, the
same command continues. Run as `python -m tools.micro.pretrain --work-dir outputs/micro`.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from PIL import Image

from tools.micro import card, dit, measure, models, vae
from wanlora.files import partial_path, write_atomic, write_json
from wanlora.micro import world
from wanlora.wan.device import select_device
from wanlora.wan.encoders import TextEncoder
from wanlora.wan.model_folder import MICRO, resolve

logger = logging.getLogger(__name__)

SEED = 0
CLIPS_PER_CONCEPT = max(stage.clips_per_concept for stage in dit.STAGES)
"""Clips to encode for the DiT, of `world.KNOWN` only."""
MEASURED_PER_CONCEPT = 24


def run(work_dir: Path, folder: Path, device: torch.device) -> None:
    """Train the parts that are not trained yet, then write and measure the model's folder."""
    work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)  # the DiT's initial weights are drawn by its class
    autoencoder, text = models.make_vae(), models.make_text_encoder(SEED)
    vae.initialise(autoencoder, SEED)
    vae.train(autoencoder.to(device), vae.SCHEDULE, work_dir / "vae.pt", SEED)
    clips = cached_clips(autoencoder, text, work_dir)
    transformer = models.make_transformer().to(device)
    dit.shorten_text(transformer)
    for number, stage in enumerate(dit.STAGES):
        chosen = first_clips(clips, stage.clips_per_concept)
        checkpoint = work_dir / f"dit-{number}.pt"
        transformer = dit.train(transformer, chosen, stage, checkpoint, SEED + number)
    models.save(folder, autoencoder.cpu(), transformer.cpu(), text)
    figures = measure.measure(folder, clips_per_concept=MEASURED_PER_CONCEPT)
    write_json(work_dir / "figures.json", figures)
    Image.fromarray(measure.contact_sheet(folder)).save(work_dir / "sheet.png")
    write_atomic(folder / "README.md", card.text(folder, figures).encode())
    for line in measure.failures(figures, measure.BARS):
        logger.warning("below the bar: %s", line)


def cached_clips(autoencoder: AutoencoderKLWan, text: TextEncoder, work_dir: Path) -> dit.Clips:
    """Encode the DiT's clips once, concepts slowest.

    The statistics of the first stage's clips go into the VAE's configuration.
    """
    path = work_dir / "latents.pt"
    seeds = range(CLIPS_PER_CONCEPT)
    if not path.exists():
        temporary = partial_path(path)
        torch.save(dit.raw_latents(autoencoder, world.KNOWN, seeds), temporary)
        temporary.replace(path)
    raw = torch.load(path, weights_only=True)
    first = _first(raw, dit.STAGES[0].clips_per_concept)
    models.set_statistics(
        autoencoder, first.mean((0, 2, 3, 4)).tolist(), first.std((0, 2, 3, 4)).tolist()
    )
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(autoencoder.config.latents_mean).view(shape)
    std = torch.tensor(autoencoder.config.latents_std).view(shape)
    captions = [world.scene(concept, seed).caption for concept in world.KNOWN for seed in seeds]
    return dit.Clips((raw - mean) / std, dit.embed(text, captions), dit.embed(text, [""])[0])


def first_clips(clips: dit.Clips, per_concept: int) -> dit.Clips:
    """The first clips of each concept."""
    return dit.Clips(
        _first(clips.latents, per_concept), _first(clips.prompt_embeds, per_concept), clips.empty
    )


def _first(rows: torch.Tensor, per_concept: int) -> torch.Tensor:
    parts = rows.chunk(len(world.KNOWN))
    return torch.cat([part[:per_concept] for part in parts])


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(description="Train the embedded model from random weights.")
    parser.add_argument("--work-dir", type=Path, required=True, help="checkpoints and latents")
    parser.add_argument("--output", type=Path, help="the model's folder; default: the package's")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run(given.work_dir, given.output or resolve(MICRO, ()), select_device(given.device, MICRO))


if __name__ == "__main__":
    main()
