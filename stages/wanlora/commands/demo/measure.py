"""Measurements of the demo itself: recognised clips, and the seconds of encoding a clip.

Owns: the seeds of prompts and noise, and the parts of a one-stage step.
Dimensions: t frames, h and w pixels.
"""

import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8

from wanlora import progress
from wanlora.adapters.attach import attach, scaled
from wanlora.data.clip_frames import ClipDataset
from wanlora.micro import world
from wanlora.micro.generation import clip_maker
from wanlora.micro.recognise import Seen, recognise
from wanlora.wan.encoders import encode_latents, encode_prompts, load_text_encoder, load_vae
from wanlora.wan.model_folder import MICRO, PIPELINE, resolve
from wanlora.wan.pipeline import load_pipeline

CPU = torch.device("cpu")
FIRST_SEED = 3_000_000
"""First seed of prompts and noise; training never uses these seeds."""

Video = UInt8[np.ndarray, "t h w 3"]


class Made(NamedTuple):
    """Clips of one model, and the concept that is recognised in each of them."""

    clips: list[Video]
    seen: list[Seen]

    def share(self, concept: str) -> float:
        """Share of the clips that show a concept."""
        return statistics.mean(one.concept == concept for one in self.seen)


def scenes(concept: str, count: int, *, seed: int) -> list[world.Scene]:
    """Choose scenes of a concept with colours and directions that training did not use."""
    return [world.scene(concept, FIRST_SEED + 1000 * seed + index) for index in range(count)]


def make_clips(asked: list[world.Scene], adapter: Path | None, *, seed: int) -> Made:
    """Generate a clip for each scene with the base or with an adapter, and recognise it."""
    pipeline = load_pipeline(resolve(MICRO, PIPELINE), dtype=torch.float32, device=CPU)
    if adapter is not None:
        attach(pipeline.transformer, [scaled(adapter, 1.0)])
    make = clip_maker(pipeline)
    name = "base" if adapter is None else "adapter"
    clips = []
    with progress.bar(total=len(asked), description=f"clips of {name}", unit="clip") as bar:
        for index, scene in enumerate(asked):
            clips.append(make(scene.caption, FIRST_SEED + seed + index))
            bar.update()
    return Made(clips, [recognise(clip) for clip in clips])


def encoding_seconds(manifest: Path, *, num_clips: int = 6) -> float:
    """Measure the seconds that one-stage training spends on a clip before a step.

    A clip is decoded and encoded by the VAE and the text encoder. The result is the median over a
    few clips; the first one is not counted.

    Args:
        manifest: The clips.
        num_clips: Maximum number of clips.
    """
    folder = resolve(MICRO, PIPELINE)
    vae = load_vae(folder, dtype=torch.float32, device=CPU, tf32=True)
    text = load_text_encoder(folder, dtype=torch.float32, device=CPU)
    dataset: Any = ClipDataset(manifest)
    seconds = []
    for index in range(min(num_clips + 1, len(dataset))):
        start = time.perf_counter()
        item = dataset[index]
        encode_latents(vae, item["frames"].movedim(0, 1)[None])
        encode_prompts(text, [item["prompt"]])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:] or seconds)
