"""Shared values of all videos of a `sample` command: model, adapters, device, and settings.

Owns: the defaults of settings that depend on the model or on the adapters, and the checks that need
torch but no loaded model.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from wanlora import __version__
from wanlora.adapters.attach import ScaledAdapter, scaled
from wanlora.adapters.base_format import format_of_base
from wanlora.adapters.routing import describe, route
from wanlora.adapters.trained_on import log_unknown_kind
from wanlora.commands.sample import preflight
from wanlora.commands.sample.videos import Video
from wanlora.config import SampleConfig
from wanlora.core.buckets import Bucket
from wanlora.core.location import Location
from wanlora.core.text import shorten
from wanlora.cost.memory import Quantize
from wanlora.errors import ConfigError, DeviceError
from wanlora.store.views import frame_rate, read_view
from wanlora.wan import pipeline as wan
from wanlora.wan.device import base_dtype, select_device, warn_of_toy
from wanlora.wan.encoders import MAX_SEQUENCE_LENGTH, load_tokenizer, num_prompt_tokens
from wanlora.wan.model_folder import PIPELINE, resolve_configs, resolve_pipeline
from wanlora.wan.placement import Placement, select_placement
from wanlora.wan.variants import Variant, variant_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Setup:
    """Model, adapters, device and settings of all videos.

    Attributes:
        model: The `--model` value.
        folder: Folder with the model's weights.
        variant: Variant of the model.
        adapters: Adapters with their scales; empty = the base model.
        device: Device to compute on.
        dtype: Type of the transformer.
        quantize: Format of the weights in its blocks.
        settings: Size, steps and guidance.
        fps: Frames per second of the videos.
        shift: The scheduler's shift of sigma.
        placement: Parts of the pipeline that wait in main memory.
        vae_tiling: True to decode frames in overlapping tiles.
        compare: True to show the base model beside the adapters in each video.
    """

    model: str
    folder: Path
    variant: Variant
    adapters: tuple[ScaledAdapter, ...]
    device: torch.device
    dtype: torch.dtype
    quantize: Quantize
    settings: wan.VideoSettings
    fps: float
    shift: float
    placement: Placement
    vae_tiling: bool
    compare: bool

    @property
    def record(self) -> dict[str, Any]:
        """Fields that the records of all videos share: enough to make the videos again."""
        settings = asdict(self.settings)
        if self.settings.guidance_scale_low is None:  # a model with one transformer
            del settings["guidance_scale_low"]
        return {
            "model": self.model,
            "adapters": [item.record for item in self.adapters],
            "compare": self.compare,
            **settings,
            "shift": self.shift,
            "vae_tiling": self.vae_tiling,
            "fps": self.fps,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            **({"quantize": self.quantize} if self.quantize != "none" else {}),
            "versions": {"wanlora": __version__, **wan.versions()},
        }


def open_setup(config: SampleConfig, videos: Sequence[Video]) -> tuple[Setup, list[Video]]:
    """Select the model, the device and the settings; nothing is loaded yet.

    Args:
        config: The settings.
        videos: The videos to make, from `preflight.check`.

    Returns:
        The values, and the videos, without first frames that the model does not take.

    Raises:
        WanloraError: A setting, the device, the model or an adapter cannot be used.
    """
    given = preflight.given_adapters(config)
    recorded = preflight.recorded_in(given)
    model = preflight.model_of(config.model, given)
    device = select_device(config.device, model)
    _check_offload(config.offload, device)
    warn_of_toy(model)
    variant = variant_of(resolve_configs(model, PIPELINE))  # checked before a download of weights
    experts = route(given, variant, model=model)
    for item in given:
        log_unknown_kind(item.header, variant, model=model)
    to_make = preflight.for_model(videos, variant, model=model)
    if variant.boundary is not None:
        logger.info("%s", describe(given, experts))
    adapters = tuple(
        scaled(item.header.path, item.scale, expert=expert)
        for item, expert in zip(given, experts, strict=True)
    )
    size = preflight.video_size(
        variant, recorded,
        num_frames=config.num_frames, height=config.height, width=config.width,
    )  # fmt: skip
    settings = video_settings(
        variant, size, steps=config.steps, guidance_scale=config.guidance_scale,
        guidance_scale_low=config.guidance_scale_low, negative_prompt=config.negative_prompt,
    )  # fmt: skip
    folder, dtype = resolve_pipeline(model), base_dtype(config.dtype, device)
    quantize = format_of_base(config.quantize, [item.header for item in given])
    fps = config.fps or preflight.trained_on(recorded, "fps")
    setup = Setup(
        model=model,
        folder=folder,
        variant=variant,
        adapters=adapters,
        device=device,
        dtype=dtype,
        quantize=quantize,
        settings=settings,
        fps=fps or _fps_of_clips(config.cache, config.view) or variant.defaults.fps,
        shift=variant.shift_of(size) if config.shift is None else config.shift,
        placement=select_placement(
            config.offload,
            config.stream_blocks,
            folder,
            variant,
            size,
            device=device,
            dtype=dtype,
            quantize=quantize,
        ),
        vae_tiling=config.vae_tiling,
        compare=config.compare,
    )
    return setup, to_make


def video_settings(
    variant: Variant,
    size: Bucket,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_scale_low: float | None = None,
    negative_prompt: str | None = None,
) -> wan.VideoSettings:
    """Complete the settings of the videos with the variant's defaults.

    Args:
        variant: Variant of the model.
        size: Size of the videos.
        steps: Denoising steps, if set.
        guidance_scale: Classifier-free guidance, if set; also of a low-noise expert.
        guidance_scale_low: Guidance of the low-noise expert, if set.
        negative_prompt: Description of what to avoid, if set.

    Raises:
        ConfigError: The model has no low-noise expert.
    """
    first, *low = variant.guidance_scales(guidance_scale, guidance_scale_low)
    defaults = variant.defaults
    return wan.VideoSettings(
        num_frames=size.num_frames,
        height=size.height,
        width=size.width,
        steps=defaults.steps if steps is None else steps,
        guidance_scale=first,
        negative_prompt=defaults.negative_prompt if negative_prompt is None else negative_prompt,
        guidance_scale_low=low[0] if low else None,
    )


def check_lengths(folder: Path, prompts: Sequence[str]) -> None:
    """Refuse a prompt that the text encoder would cut.

    Args:
        folder: Folder with the model's tokenizer.
        prompts: Prompts of the videos, and the negative prompt.

    Raises:
        ConfigError: A prompt has too many tokens.
    """
    tokenizer = load_tokenizer(folder)
    for prompt in dict.fromkeys(prompts):
        if (tokens := num_prompt_tokens(tokenizer, prompt)) > MAX_SEQUENCE_LENGTH:
            raise ConfigError(
                f"the prompt {shorten(prompt)} has {tokens} tokens; Wan reads at most "
                f"{MAX_SEQUENCE_LENGTH} and would ignore the rest: shorten it"
            )


def _check_offload(offload: str, device: torch.device) -> None:
    if offload not in ("auto", "none") and device.type == "cpu":
        raise DeviceError(
            f"--offload {offload} moves parts of the model between a GPU and main memory, and "
            "everything is computed on the CPU here: leave it out"
        )


def _fps_of_clips(cache: Location | None, view: str) -> float | None:
    """Frames per second of the clips of a cache; None without a cache."""
    return None if cache is None else frame_rate(read_view(cache, view).clips)
