"""Shared values of an evaluation: clips, sigmas, noise, prompts, sizes and base weights.

Owns: the checks before a model is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wanlora.commands.evaluate import preflight
from wanlora.config import EvaluateConfig
from wanlora.core.buckets import Bucket
from wanlora.core.location import Location
from wanlora.store.captions import captions
from wanlora.store.reader import StoreReader
from wanlora.store.views import View, frame_rate
from wanlora.training.batches import BatchSource
from wanlora.training.source import make_source
from wanlora.training.validation import Panel, make_panel
from wanlora.wan.device import base_dtype, select_device, warn_of_toy
from wanlora.wan.model_folder import resolve
from wanlora.wan.variants import Variant, variant_of
from wanlora.wan.weights import weights_sha256


@dataclass(frozen=True)
class Setup:
    """Values that are the same for the base and every adapter, so that only the adapter differs.

    Attributes:
        cache: The cache.
        view: Its view.
        source: Latents and prompt embeddings of the held-out clips.
        panel: Clips and sigmas of the losses.
        prompts: Captions of each activity: text to key.
        model: The `--model` value.
        folder: Folder with the model's weights.
        variant: Variant of the model.
        weights: Hex sha256 of each part of the model that is used.
        device: Device to compute on.
        dtype: Type of the transformer.
        num_videos: Videos of each activity by each model; 0 = only losses.
        bucket: Size of the videos.
        fps: Frames per second of the videos.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance.
    """

    cache: Location
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
    num_videos: int
    bucket: Bucket
    fps: float
    steps: int
    guidance_scale: float

    @property
    def facts(self) -> dict[str, Any]:
        """Everything except the adapter that a model's results depend on."""
        return {
            "weights": self.weights,
            "latents": self.view.latents,
            "text": self.view.text,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
        }


def open_setup(config: EvaluateConfig, view: View) -> Setup:
    """Run all checks that need no loaded model, and open the cache.

    Args:
        config: The settings.
        view: The cache's view, from `preflight.check`.

    Raises:
        WanloraError: There is no such view, split, device, model or size, or they do not fit.
    """
    held_out = preflight.held_out_clips(view, config.split)
    model = config.model or view.model
    device = select_device(config.device, model)
    warn_of_toy(model)
    parts = preflight.parts_of_model(videos=config.videos_per_activity > 0)
    folder = resolve(model, parts)
    variant = variant_of(folder)
    preflight.check_model(view, variant, cache=config.cache, model=model)
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
        cache=config.cache,
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
        num_videos=config.videos_per_activity,
        bucket=preflight.video_size(
            held_out,
            num_frames=config.num_frames,
            height=config.height,
            width=config.width,
        ),
        fps=config.fps or frame_rate(held_out),
        steps=config.steps or variant.defaults.steps,
        guidance_scale=variant.part(None).guidance_scale if guidance is None else guidance,
    )
