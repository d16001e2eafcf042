"""Shared values of an evaluation: clips, sigmas, noise, prompts, sizes and base weights.

Owns: the checks before a model is loaded, and the range of noise levels of each transformer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from wanlora.adapters.base_format import format_of_base
from wanlora.adapters.trained_on import log_unknown_kind
from wanlora.commands.evaluate import preflight
from wanlora.config import EvaluateConfig
from wanlora.core.buckets import Bucket
from wanlora.core.location import Location
from wanlora.cost.memory import Quantize
from wanlora.store.captions import captions
from wanlora.store.reader import StoreReader
from wanlora.store.views import View, ViewClip, frame_rate
from wanlora.training import flow
from wanlora.training.batches import BatchSource
from wanlora.training.source import make_source
from wanlora.training.validation import Panel, make_panel
from wanlora.wan.device import base_dtype, select_device, warn_of_toy
from wanlora.wan.model_folder import resolve, resolve_configs
from wanlora.wan.variants import Expert, TransformerPart, Variant, describe_range, variant_of
from wanlora.wan.weights import weights_sha256


@dataclass(frozen=True)
class Range:
    """Noise levels that one transformer is for, and what its losses are measured on.

    Attributes:
        part: The transformer.
        share: Probability of the range under the density; 1 with one transformer.
        source: Latents and prompt embeddings of the held-out clips, and noise levels of the range.
        panel: Clips and noise levels of the losses; the clips are the same for both experts.
    """

    part: TransformerPart
    share: float
    source: BatchSource
    panel: Panel

    @property
    def name(self) -> str:
        """Expert and range, for messages."""
        return f"{self.part.expert}-noise expert, {describe_range(self.part.sigmas)}"


@dataclass(frozen=True)
class Setup:
    """Values that are the same for the base and every adapter, so that only the adapter differs.

    Attributes:
        cache: The cache.
        view: Its view.
        split: Split of the clips and captions.
        ranges: Range of each transformer that has an adapter, highest noise first.
        captioned: The view without clips that no video can start from.
        prompts: Captions of its clips, by activity: text to key.
        model: The `--model` value.
        folder: Folder with the model's weights.
        variant: Variant of the model.
        weights: Hex sha256 of each part of the model that is used.
        device: Device to compute on.
        dtype: Type of the transformers.
        quantize: Format of the weights in their blocks, of the base and of every adapter.
        stream_blocks: The `--stream-blocks` value.
        num_videos: Videos of each activity by each model; 0 = only losses.
        bucket: Size of the videos.
        fps: Frames per second of the videos.
        steps: Denoising steps.
        guidance_scales: Classifier-free guidance of each transformer, in the order of the variant.
    """

    cache: Location
    view: View
    split: str
    ranges: tuple[Range, ...]
    captioned: View
    prompts: Mapping[str, Mapping[str, str]]
    model: str
    folder: Path
    variant: Variant
    weights: dict[str, str]
    device: torch.device
    dtype: torch.dtype
    quantize: Quantize
    stream_blocks: int | Literal["auto"]
    num_videos: int
    bucket: Bucket
    fps: float
    steps: int
    guidance_scales: tuple[float, ...]

    @property
    def is_pair(self) -> bool:
        """Return True for a model with two transformers."""
        return self.variant.boundary is not None

    @property
    def source(self) -> BatchSource:
        """Latents and prompt embeddings; its noise levels are those of the first range."""
        return self.ranges[0].source

    @property
    def clips(self) -> tuple[ViewClip, ...]:
        """Held-out clips of the losses."""
        return self.ranges[0].panel.clips

    @property
    def sigmas(self) -> list[float]:
        """Noise levels of all losses, rising."""
        return sorted(sigma for item in self.ranges for sigma in item.panel.sigmas)

    @property
    def density(self) -> dict[str, str]:
        """Density of the noise levels, as the header of an adapter records that of its training."""
        return {"sampler": self.source.sampler, "shift": str(self.source.shift)}

    @property
    def facts(self) -> dict[str, Any]:
        """Everything except the adapter that a model's results depend on."""
        return {
            "weights": self.weights,
            **{kind: self.view.fingerprint(kind) for kind in self.variant.kinds},
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            **({"quantize": self.quantize} if self.quantize != "none" else {}),
        }


def open_setup(config: EvaluateConfig, view: View) -> tuple[Setup, list[Expert | None]]:
    """Run all checks that need no loaded model, and open the cache.

    Args:
        config: The settings.
        view: The cache's view, from `preflight.check`.

    Returns:
        The values, and the expert of each adapter of the command line.

    Raises:
        WanloraError: There is no such view, split, device, model or size, or they do not fit.
    """
    held_out = preflight.held_out_clips(view, config.split)
    model = config.model or view.model
    device = select_device(config.device, model)
    warn_of_toy(model)
    given = preflight.given_adapters(config)
    variant = variant_of(resolve_configs(model), preflight.any_expert(given))
    preflight.check_model(view, variant, cache=config.cache, model=model)
    experts = preflight.experts_of(given, variant, model=model)
    for item in given:
        log_unknown_kind(item.header, variant, model=model)
    guidance_scales = variant.guidance_scales(config.guidance_scale, config.guidance_scale_low)
    parts = preflight.parts_of_model(variant, experts, videos=config.videos_per_activity > 0)
    folder = resolve(model, parts)
    reader = StoreReader.of_view(config.cache, view, variant.kinds)
    bucket = preflight.video_size(
        held_out, num_frames=config.num_frames, height=config.height, width=config.width
    )
    captioned = view
    if config.videos_per_activity:
        captioned = preflight.clips_to_start_from(view, variant, bucket, split=config.split)
    setup = Setup(
        cache=config.cache,
        view=view,
        split=config.split,
        ranges=tuple(
            _range(config, view, reader, variant, part)
            for part in variant.transformers
            if part.expert in experts
        ),
        captioned=captioned,
        prompts=captions(reader, captioned, config.split),
        model=model,
        folder=folder,
        variant=variant,
        weights={part: weights_sha256(folder / part) for part in parts},
        device=device,
        dtype=base_dtype(config.dtype, device),
        quantize=format_of_base(config.quantize, [item.header for item in given]),
        stream_blocks=config.stream_blocks,
        num_videos=config.videos_per_activity,
        bucket=bucket,
        fps=config.fps or frame_rate(held_out),
        steps=config.steps or variant.defaults.steps,
        guidance_scales=guidance_scales,
    )
    return setup, experts


def _range(
    config: EvaluateConfig, view: View, reader: StoreReader, variant: Variant, part: TransformerPart
) -> Range:
    """Choose the clips and noise levels of a transformer's losses."""
    held_out = preflight.held_out_clips(view, config.split)
    source = make_source(
        view, reader, held_out, variant,
        seed=config.seed, sampler=config.sampler, shift=config.shift, sigmas=part.sigmas,
    )  # fmt: skip
    panel = make_panel(
        config.split, held_out, source, num_clips=config.num_clips, num_sigmas=config.num_sigmas
    )
    assert panel
    share = flow.share_of(part.sigmas, sampler=source.sampler, shift=source.shift)
    return Range(part, share, source, panel)
