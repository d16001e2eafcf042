"""Measure the embedded image-to-video model: the figures on its card.

Owns: the figures and their minimums. All clips are drawn from seeds that are not used in training.
Dimensions: t frames, y and x pixels.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8

from tools.micro import dit
from tools.micro.condition import encoded, widen
from tools.micro.drawn_images import example, nearer, short_prompt
from tools.micro.measure import FIRST_SEED, rate
from tools.micro.models import ROW
from wanlora import progress
from wanlora.micro import world
from wanlora.micro.generation import clip_maker
from wanlora.training import flow
from wanlora.wan.encoders import decode_latents, encode_latents, load_text_encoder, load_vae
from wanlora.wan.model_folder import MICRO, PIPELINE, resolve
from wanlora.wan.pipeline import load_pipeline
from wanlora.wan.transformer import load_transformer

CPU = torch.device("cpu")

Image = UInt8[np.ndarray, "y x 3"]
Video = UInt8[np.ndarray, "t y x 3"]

BARS = {
    "first_frame_psnr_db": 25.0,
    "concept": 0.80,
    "direction": 0.80,
    "direction_from_the_middle": 0.80,
    "colour": 0.95,
    "background": 0.95,
    "colour_of_the_image": 0.95,
    "background_of_the_image": 0.95,
}
"""Minimum of each figure; `concept` holds for every class."""


class Case(NamedTuple):
    """A video to make: its first frame, its prompt, and what it must show."""

    image: Image
    prompt: str
    scene: world.Scene


def measure(folder: Path, *, clips_per_concept: int) -> dict[str, Any]:
    """Measure everything; takes a second per clip.

    Args:
        folder: Folder of the image-to-video model.
        clips_per_concept: Clips of each known concept for each kind of prompt.
    """
    make = clip_maker(load_pipeline(folder, dtype=torch.float32, device=CPU))
    from_image = lambda case, seed: make(case.prompt, seed, case.image)  # noqa: E731
    named: dict[str, list[float]] = {}
    silent: dict[str, list[float]] = {}
    concepts, errors = {}, []
    for concept in world.KNOWN:
        full = cases(concept, clips_per_concept, short=False)
        made = generated(from_image, full, concept)
        errors += [psnr(clip[0], case.image) for clip, case in zip(made, full, strict=True)]
        rates = rate(made, [case.scene for case in full])
        concepts[concept] = rates.pop("concept")
        _add(named, rates)
        short = cases(concept, clips_per_concept, short=True)
        _add(silent, rate(generated(from_image, short, concept), [case.scene for case in short]))
    middle = from_the_middle(clips_per_concept)
    turned = rate(generated(from_image, middle, "directions"), [case.scene for case in middle])
    return {
        "first_frame_psnr_db": round(statistics.median(errors), 2),
        "concept": concepts,
        **{name: round(statistics.mean(values), 3) for name, values in named.items()},
        **{f"{name}_of_the_image": round(statistics.mean(silent[name]), 3)
           for name in ("colour", "background")},
        "concept_short_prompt": round(statistics.mean(silent["concept"]), 3),
        "direction_from_the_middle": round(turned["direction"], 3),
        "clips_per_concept": clips_per_concept,
    }  # fmt: skip


@torch.no_grad()
def held_out_loss(transformer_dir: Path, clips_per_concept: int) -> float:
    """Mean loss on fixed pairs of clips that were not used in training.

    Args:
        transformer_dir: Folder that holds `transformer/`.
        clips_per_concept: Clips of each known concept, each with four sigmas.
    """
    base = resolve(MICRO, PIPELINE)
    vae = load_vae(base, dtype=torch.float32, device=CPU, tf32=True)
    text = load_text_encoder(base, dtype=torch.float32, device=CPU)
    transformer = load_transformer(transformer_dir, dtype=torch.float32, device=CPU)
    if transformer.config.in_channels == ROW.vae.z_dim:  # before its training
        transformer = widen(transformer).eval()
    dit.shorten_text(transformer)
    examples = [
        example(concept, FIRST_SEED + index)
        for concept in world.KNOWN
        for index in range(clips_per_concept)
    ]
    latents, condition = encoded(vae, examples)
    embeds = dit.embed(text, [one.prompt for one in examples])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    values = [
        dit.loss_at(
            transformer, latents, embeds, noise,
            torch.full((len(latents),), flow.shift_sigma(u, ROW.defaults.shift)), condition,
        )
        for u in (0.125, 0.375, 0.625, 0.875)
    ]  # fmt: skip
    return round(float(torch.stack(values).mean()), 4)


def references(folder: Path, clips_per_concept: int) -> dict[str, float]:
    """PSNR of the first frame by the VAE alone, and by the model that sees no image.

    Args:
        folder: Folder of the image-to-video model.
        clips_per_concept: Clips of each known concept.
    """
    vae = load_vae(folder, dtype=torch.float32, device=CPU, tf32=True)
    text = resolve(MICRO, PIPELINE)
    make = clip_maker(load_pipeline(text, dtype=torch.float32, device=CPU))
    by_vae, by_text = [], []
    for concept in world.KNOWN:
        for seed, case in enumerate(cases(concept, clips_per_concept, short=False)):
            frame = torch.from_numpy(case.image).permute(2, 0, 1)[None, :, None]
            by_vae.append(psnr(decode_latents(vae, encode_latents(vae, frame))[0, 0].numpy(),
                               case.image))  # fmt: skip
            by_text.append(psnr(make(case.prompt, seed)[0], case.image))
    return {
        "first_frame_psnr_db_of_the_vae": round(statistics.median(by_vae), 2),
        "first_frame_psnr_db_without_an_image": round(statistics.median(by_text), 2),
    }


def cases(concept: str, count: int, *, short: bool) -> list[Case]:
    """First frames of clips of the world; `short` prompts do not name the colours."""
    found = []
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        drawn = world.draw(concept, seed)
        prompt = short_prompt(drawn.scene) if short else drawn.scene.caption
        found.append(Case(drawn.frames[0], prompt, drawn.scene))
    return found


def from_the_middle(count: int) -> list[Case]:
    """Shapes in the middle of the picture, each with a prompt for every direction."""
    found = []
    for concept in ("circle", "square"):
        for seed in range(FIRST_SEED, FIRST_SEED + (count + 3) // 4):
            scene = world.scene(concept, seed)
            cover = nearer(world.cover(concept, seed), scene.direction, 1.0)
            image = world.paint(cover[:1], scene)[0]
            for direction in world.DIRECTIONS:
                turned = scene._replace(direction=direction)
                found.append(Case(image, turned.caption, turned))
    return found


def generated(make: Callable[[Case, int], Video], todo: Sequence[Case], name: str) -> list[Video]:
    """Make the videos, seeds from 0."""
    made = []
    with progress.bar(total=len(todo), description=name, unit="clip") as bar:
        for seed, case in enumerate(todo):
            made.append(make(case, seed))
            bar.update()
    return made


def psnr(found: Image, expected: Image) -> float:
    """PSNR of 8-bit pictures, dB."""
    error = np.square(found.astype(np.float64) - expected.astype(np.float64)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def contact_sheet(folder: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Given images, each followed by frames of the video made from it.

    A row per known concept with two scenes, then one image with a prompt for each direction.
    """
    make = clip_maker(load_pipeline(folder, dtype=torch.float32, device=CPU))

    def strip(case: Case, seed: int) -> np.ndarray:
        clip = make(case.prompt, seed, case.image)
        border = np.full((world.SIZE_PX, 4, 3), 255, np.uint8)
        return np.concatenate([case.image, border, *clip[::4], border], axis=1)

    rows = [
        [strip(case, seed) for seed, case in enumerate(cases(concept, 2, short=False))]
        for concept in world.KNOWN
    ]
    turned = from_the_middle(1)
    rows += [
        [strip(turned[first + step], first) for step in (0, 1)]
        for first in range(0, len(turned), 2)
    ]
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def _add(values: dict[str, list[float]], rates: dict[str, float]) -> None:
    for name, share in rates.items():
        values.setdefault(name, []).append(share)
