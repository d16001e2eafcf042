"""Measure the embedded model: the figures on its card.

Owns: the figures and their minimums. All clips are drawn from seeds that are not used in training.
Dimensions: t frames, h and w pixels.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from tools.micro import shape
from tools.micro.models import ROW
from wanlora import progress
from wanlora.micro import recognise, world
from wanlora.micro.generation import clip_maker
from wanlora.training import flow
from wanlora.wan.encoders import decode_latents, encode_latents, encode_prompts, load_text_encoder
from wanlora.wan.encoders import load_vae as load_checked_vae
from wanlora.wan.pipeline import load_pipeline
from wanlora.wan.transformer import load_transformer

CPU = torch.device("cpu")
FIRST_SEED = 1_000_000
"""Training draws from 0 up."""

Video = UInt8[np.ndarray, "t h w 3"]

BARS = {
    "psnr_db": 27.0,
    "motion_kept": 0.55,
    "colour": 0.95,
    "background": 0.95,
    "direction": 0.90,
    "concept": 0.70,
    "shape": 0.90,
    "wrong_over_right": 3.0,
}
"""Minimum of each figure; `motion_kept`, `concept` and `shape` hold for every class."""


def measure(folder: Path, *, clips_per_concept: int) -> dict[str, Any]:
    """Measure everything; takes two seconds per clip."""
    vae = load_checked_vae(folder, dtype=torch.float32, device=CPU, tf32=True)
    figures: dict[str, Any] = reconstruction(
        lambda frames: decode_latents(vae, encode_latents(vae, _tensor(frames)))[0].numpy(), 8
    )
    figures |= prompt_matters(folder, 4)
    return figures | generation(folder, clips_per_concept)


def reconstruction(rebuild: Callable[[Video], Video], clips_per_concept: int) -> dict[str, Any]:
    """PSNR over all concepts, and by concept the share of motion kept and the shape score."""
    errors, kept, shapes = [], {}, {}
    for concept in world.CONCEPTS:
        shares, clips = [], []
        for index in range(clips_per_concept):
            frames = world.draw(concept, FIRST_SEED + index).frames
            rebuilt = rebuild(frames)
            errors.append(np.square(rebuilt - frames.astype(np.float64)).mean())
            shares.append(motion_kept(frames, rebuilt))
            clips.append(rebuilt)
        kept[concept] = round(statistics.mean(shares), 3)
        if concept in world.KNOWN:
            shapes[concept] = shape_score(clips, concept)
    return {
        "psnr_db": round(float(10 * np.log10(255**2 / np.mean(errors))), 2),
        "motion_kept": kept,
        "vae_shape": shapes,
    }


def motion_kept(frames: Video, rebuilt: Video) -> float:
    """Projection of the rebuilt differences between frames on the real ones: 0 frozen, 1 all.

    <d rebuilt, d frames> / <d frames, d frames>: flicker that is not the real motion adds nothing.
    """
    real, found = (
        np.diff(frames.astype(np.float64), axis=0),
        np.diff(rebuilt.astype(np.float64), axis=0),
    )
    return float((found * real).sum() / np.square(real).sum())


def prompt_matters(folder: Path, clips_per_concept: int) -> dict[str, Any]:
    """Loss on held-out clips with the right prompt, and with one wrong in every word."""
    vae = load_checked_vae(folder, dtype=torch.float32, device=CPU, tf32=True)
    transformer = load_transformer(folder, dtype=torch.float32, device=CPU)
    text = load_text_encoder(folder, dtype=torch.float32, device=CPU)
    losses: dict[str, list[float]] = {"right": [], "wrong": []}
    for concept in world.KNOWN:
        for index in range(clips_per_concept):
            drawn = world.draw(concept, FIRST_SEED + index)
            latents = encode_latents(vae, _tensor(drawn.frames))
            captions = {"right": drawn.scene.caption, "wrong": wrong(drawn.scene).caption}
            for name, caption in captions.items():
                losses[name].append(_loss(transformer, latents, _rows(text, caption), index))
    right, wrong_ = (statistics.mean(losses[name]) for name in ("right", "wrong"))
    return {
        "loss_right_prompt": round(right, 4),
        "loss_wrong_prompt": round(wrong_, 4),
        "wrong_over_right": round(wrong_ / right, 2),
    }


def wrong(scene: world.Scene) -> world.Scene:
    """A scene that differs from another in everything."""
    following = {
        name: values[(values.index(getattr(scene, name)) + 1) % len(values)]
        for name, values in (
            ("colour", list(world.COLOURS)),
            ("background", list(world.BACKGROUNDS)),
            ("concept", list(world.KNOWN)),
        )
    }
    direction = None
    if following["concept"] in world.SHAPES:
        turned = {"left": "right", "right": "up", "up": "down", "down": "left"}
        direction = turned.get(scene.direction or "left")
    return world.Scene(direction=direction, **following)


def generation(folder: Path, clips_per_concept: int) -> dict[str, Any]:
    """Share of generated clips that show what the prompt named, and the shape score by class."""
    make = clip_maker(load_pipeline(folder, dtype=torch.float32, device=CPU))
    concepts, shapes, rest = {}, {}, []
    for concept in world.KNOWN:
        scenes = fresh_scenes(concept, clips_per_concept)
        clips = []
        with progress.bar(total=len(scenes), description=concept, unit="clip") as bar:
            for index, scene in enumerate(scenes):
                clips.append(make(scene.caption, index))
                bar.update()
        rates = rate(clips, scenes)
        concepts[concept] = rates.pop("concept")
        shapes[concept] = shape_score(clips, concept)
        rest.append(rates)
    figures = {
        name: round(statistics.mean(row[name] for row in rest if name in row), 3)
        for name in ("colour", "background", "direction")
    }
    return {"concept": concepts, "shape": shapes, **figures, "clips_per_concept": clips_per_concept}


def rate(clips: Sequence[Video], scenes: Sequence[world.Scene]) -> dict[str, float]:
    """Share of clips recognised as their prompts: concept, colour, background, direction.

    Args:
        clips: Clips, in the order of the scenes.
        scenes: Scenes of their prompts; a person has no direction and does not count there.
    """
    right: dict[str, list[bool]] = {}
    for clip, scene in zip(clips, scenes, strict=True):
        seen = recognise.recognise(clip)
        for name in ("concept", "colour", "background", "direction"):
            if (expected := getattr(scene, name)) is not None:
                right.setdefault(name, []).append(getattr(seen, name) == expected)
    return {name: sum(values) / len(values) for name, values in right.items()}


def shape_score(clips: Sequence[Video], concept: str) -> float:
    """Median over the frames of all clips."""
    return round(float(np.median([shape.score(clip, concept) for clip in clips])), 3)


def fresh_scenes(concept: str, count: int) -> list[world.Scene]:
    """Scenes to ask for, from seeds that nothing was trained with."""
    return [world.scene(concept, FIRST_SEED + index) for index in range(count)]


def failures(figures: Mapping[str, Any], bars: Mapping[str, float]) -> list[str]:
    """Figures below their minimum, each as a line."""
    missed = []
    for name, least in bars.items():
        value = figures[name]
        for label, one in value.items() if isinstance(value, dict) else [("", value)]:
            if one < least:
                missed.append(f"{name} {label}".strip() + f": {one}, expected {least} or more")
    return missed


def contact_sheet(folder: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Every known concept as a row: frames of a drawn clip, then of one made from its caption."""
    make = clip_maker(load_pipeline(folder, dtype=torch.float32, device=CPU))
    rows = []
    for concept in world.KNOWN:
        drawn = world.draw(concept, FIRST_SEED)
        pair = (drawn.frames, make(drawn.scene.caption, FIRST_SEED))
        rows.append(np.concatenate([frame for clip in pair for frame in clip[::3]], axis=1))
    return np.concatenate(rows)


def _tensor(frames: Video) -> torch.Tensor:
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None]


def _rows(text: Any, caption: str) -> torch.Tensor:
    embeds = torch.zeros(1, ROW.shape.num_text_tokens, ROW.shape.text_dim)
    rows = encode_prompts(text, [caption])[0]
    embeds[0, : len(rows)] = rows
    return embeds


@torch.no_grad()
def _loss(transformer: Any, latents: torch.Tensor, embeds: torch.Tensor, seed: int) -> float:
    """Mean over four sigmas, evenly spread quantiles of the training density."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    values = []
    for u in (0.125, 0.375, 0.625, 0.875):
        sigmas = torch.tensor([flow.shift_sigma(u, ROW.defaults.shift)])
        prediction = transformer(
            flow.mix(latents, noise, sigmas), timestep=flow.timesteps(sigmas),
            encoder_hidden_states=embeds, return_dict=False,
        )[0]  # fmt: skip
        values.append(flow.loss_per_clip(prediction, flow.velocity_target(latents, noise)).item())
    return statistics.mean(values)
