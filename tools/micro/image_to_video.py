"""Fine-tune the embedded model to animate a given first frame: `make micro-i2v`.

Owns: the order of the steps, and the folder of the result. VAE and text encoder stay those of the
embedded model. After an interruption, the same command continues. The package does not include the
result: docs/decisions/0004-a-model-that-is-shipped.md has the loss that was reached.
"""

import argparse
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from PIL import Image

from tools.micro import card_image, dit, measure, measure_image, models
from tools.micro.condition import encoded, widen
from tools.micro.drawn_images import example
from wanlora.files import partial_path, write_atomic, write_json
from wanlora.micro import world
from wanlora.wan.device import select_device
from wanlora.wan.encoders import TextEncoder, load_text_encoder, load_vae
from wanlora.wan.model_folder import ENCODERS, INDEX, MICRO, PIPELINE, resolve
from wanlora.wan.transformer import load_transformer
from wanlora.wan.weights import read_json

logger = logging.getLogger(__name__)

SEED = 2
MEASURED_PER_CONCEPT = 24
STAGES = (
    dit.Stage(40, 400, 12, 8e-3, 2.5e-3, 0.3, 0.98),
    dit.Stage(80, 320, 32, 1e-2, 3e-3, 0.25, 0.98),
    dit.Stage(80, 240, 32, 1.2e-2, 5e-3, 0.25, 0.98),
)
"""From the weights of the embedded text-to-video model."""


def cached_clips(vae: AutoencoderKLWan, text: TextEncoder, seeds: range, path: Path) -> dit.Clips:
    """Encode clips of `world.KNOWN` once; the file keeps them."""
    examples = [example(concept, seed) for concept in world.KNOWN for seed in seeds]
    if not path.exists():
        temporary = partial_path(path)
        torch.save(encoded(vae, examples), temporary)
        temporary.replace(path)
    latents, condition = torch.load(path, weights_only=True)
    prompts = [one.prompt for one in examples]
    return dit.Clips(latents, dit.embed(text, prompts), dit.embed(text, [""])[0], condition)


def joined(first: dit.Clips, second: dit.Clips) -> dit.Clips:
    """Clips of both."""
    assert first.condition is not None
    assert second.condition is not None
    return dit.Clips(
        torch.cat([first.latents, second.latents]),
        torch.cat([first.prompt_embeds, second.prompt_embeds]),
        first.empty,
        torch.cat([first.condition, second.condition]),
    )


def run(work_dir: Path, base: Path, folder: Path, device: torch.device) -> None:
    """Train the transformer, then write it to a folder.

    Args:
        work_dir: Checkpoints and latents.
        base: Folder of the embedded text-to-video model.
        folder: Folder of the result, in diffusers' layout.
        device: Device to train on.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    vae = load_vae(base, dtype=torch.float32, device=device, tf32=True)
    text = load_text_encoder(base, dtype=torch.float32, device=torch.device("cpu"))
    transformer = widen(load_transformer(base, dtype=torch.float32, device=torch.device("cpu")))
    transformer.to(device).requires_grad_(requires_grad=True)
    dit.shorten_text(transformer)
    clips, done = None, 0
    for number, stage in enumerate(STAGES):
        if seeds := range(done, stage.clips_per_concept):
            more = cached_clips(vae, text, seeds, work_dir / f"latents-{number}.pt")
            clips, done = joined(clips, more) if clips else more, stage.clips_per_concept
        assert clips
        transformer = dit.train(
            transformer, clips, stage, work_dir / f"dit-{number}.pt", SEED + number
        )
    models.save_rounded(transformer.cpu(), folder / "transformer")
    for part in (*ENCODERS, "scheduler"):
        shutil.copytree(base / part, folder / part, dirs_exist_ok=True)
    index = read_json(base / INDEX) | {"_class_name": "WanImageToVideoPipeline"}
    index |= {"image_encoder": [None, None], "image_processor": [None, None]}
    write_json(folder / INDEX, index)


def judge(work_dir: Path, folder: Path) -> None:
    """Measure the model, and write its card and its contact sheet."""
    figures = {"held_out_loss": measure_image.held_out_loss(folder, 4)}
    figures |= measure_image.measure(folder, clips_per_concept=MEASURED_PER_CONCEPT)
    figures |= measure_image.references(folder, MEASURED_PER_CONCEPT)
    write_json(work_dir / "figures.json", figures)
    Image.fromarray(measure_image.contact_sheet(folder)).save(work_dir / "sheet.png")
    write_atomic(folder / "README.md", card_image.text(folder, figures, STAGES).encode())
    for line in measure.failures(figures, measure_image.BARS):
        logger.warning("below the bar: %s", line)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(description="Train a small image-to-video model.")
    parser.add_argument("--work-dir", type=Path, required=True, help="checkpoints and latents")
    parser.add_argument("--output", type=Path, required=True, help="the model's folder")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    base = resolve(MICRO, PIPELINE)
    run(given.work_dir, base, given.output, select_device(given.device, MICRO))
    judge(given.work_dir, given.output)


if __name__ == "__main__":
    main()
