"""What all models of an evaluation share: clips, sigmas, noise, prompts, sizes and base weights.

Owns: the checks before anything is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wanlora.commands.evaluate import preflight
from wanlora.config import EvaluateConfig
from wanlora.core.buckets import Bucket
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


def open_setup(config: EvaluateConfig, view: View) -> Setup:
    """Check everything that can be checked without loading a model.

    Args:
        config: The settings.
        view: The cache's view, from `preflight.check`.

    Raises:
        WanloraError: There is no such view, split, device, model or size, or they do not fit.
    """
    held_out = preflight.held_out_clips(config, view)
    model = config.model or view.model
    device = select_device(config.device, model)
    warn_of_toy(model)
    parts = preflight.parts_of_model(config)
    folder = resolve(model, parts)
    variant = variant_of(folder)
    preflight.check_model(config, view, variant)
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
        bucket=preflight.video_size(config, held_out),
        fps=config.fps or frame_rate(held_out),
        steps=config.steps or variant.steps,
        guidance_scale=variant.guidance_scale if guidance is None else guidance,
    )
