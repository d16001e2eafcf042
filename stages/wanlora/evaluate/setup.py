"""What all models of an evaluation share: clips, sigmas, noise, prompts, sizes and base weights.

Owns: the checks before anything is loaded.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wanlora.config import EvaluateConfig
from wanlora.core.buckets import Bucket, problem_with, usual
from wanlora.errors import ConfigError
from wanlora.step.batches import BatchSource
from wanlora.step.clips import check_encodings
from wanlora.step.source import make_source
from wanlora.step.validation import Panel, make_panel
from wanlora.store.captions import captions, no_such_split
from wanlora.store.reader import StoreReader
from wanlora.store.views import View, frame_rate, read_view
from wanlora.wan.device import base_dtype, pick, warn_of_toy
from wanlora.wan.variants import Variant, resolve, variant_of
from wanlora.wan.weights import weights_sha256


@dataclass(frozen=True)
class Setup:
    """What is equal for the base and every adapter, so that they differ by the adapter alone.

    Attributes:
        prompts: Text to key of the captions of each activity.
        bucket: Size of the videos.
        fps: Frames per second of the videos.
        weights: Hex sha256 of each part of the model that is used.
    """

    view: View
    source: BatchSource
    panel: Panel
    prompts: Mapping[str, Mapping[str, str]]
    model: str
    folder: Path
    variant: Variant
    weights: dict[str, str]
    device: torch.device
    dtype: torch.dtype
    bucket: Bucket
    fps: float
    steps: int
    guidance_scale: float

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the numbers of a model, beside the adapter."""
        return {
            "weights": self.weights,
            "latents": self.view.latents,
            "text": self.view.text,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
        }


def open_setup(config: EvaluateConfig) -> Setup:
    """Check everything that can be checked without loading a model.

    Raises:
        WanloraError: There is no such view, split, device, model or size, or they do not fit.
    """
    view = read_view(config.cache, config.view)
    held_out = tuple(clip for clip in view.clips if clip.split == config.split)
    if not held_out:
        raise no_such_split(view, config.split)
    model = config.model or view.model
    device = pick(config.device, model)
    warn_of_toy(model)
    parts = ["transformer", "vae"] if config.videos_per_activity else ["transformer"]
    folder = resolve(model, parts)
    variant = variant_of(folder)
    words = ["wanlora", "cache-latents", "--cache", str(config.cache), "--model", model]
    words += [] if config.view == "default" else ["--view", config.view]
    check_encodings(view, variant, encode_again=shlex.join(words))
    reader = StoreReader.of_view(config.cache, view)
    source = make_source(
        view, reader, held_out, variant,
        seed=config.seed, sampler=config.sampler, shift=config.shift,
    )  # fmt: skip
    panel = make_panel(
        config.split, held_out, source, num_clips=config.num_clips, num_sigmas=config.num_sigmas
    )
    assert panel
    guidance = config.guidance_scale
    return Setup(
        view=view,
        source=source,
        panel=panel,
        prompts=captions(reader, view, config.split),
        model=model,
        folder=folder,
        variant=variant,
        weights={part: weights_sha256(folder / part) for part in parts},
        device=device,
        dtype=base_dtype(config.dtype, device),
        bucket=_bucket(config, usual(clip.bucket for clip in held_out)),
        fps=config.fps or frame_rate(held_out),
        steps=config.steps or variant.steps,
        guidance_scale=variant.guidance_scale if guidance is None else guidance,
    )


def _bucket(config: EvaluateConfig, held_out: Bucket) -> Bucket:
    """Size of the videos: that of the held-out clips, but for what was asked for."""
    bucket = Bucket(
        config.num_frames or held_out.num_frames,
        config.height or held_out.height,
        config.width or held_out.width,
    )
    if problem := problem_with(bucket):
        raise ConfigError(f"cannot make videos of {problem}")
    return bucket
