"""`wanlora sample`, in order: refuse, load, make each video, write it beside its record.

Owns: what is loaded and with which settings. What it shows is what any diffusers user gets from the
same files, bit for bit.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from wanlora import __version__, progress
from wanlora.adapters.attach import ScaledAdapter, attach, read_scaled
from wanlora.commands.sample import preflight
from wanlora.commands.sample.saved_previews import decode
from wanlora.commands.sample.videos import Video, missing, record_of
from wanlora.config import SampleConfig
from wanlora.core.text import shorten
from wanlora.core.units import count
from wanlora.errors import ConfigError, DeviceError
from wanlora.media import recorded
from wanlora.media.side_by_side import side_by_side
from wanlora.progress import waiting
from wanlora.store.views import frame_rate, read_view
from wanlora.wan import pipeline as wan
from wanlora.wan.device import base_dtype, select_device, warn_of_toy
from wanlora.wan.encoders import MAX_SEQUENCE_LENGTH, load_tokenizer, num_prompt_tokens
from wanlora.wan.model_folder import PIPELINE, resolve
from wanlora.wan.variants import Variant, variant_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SampleResult:
    """What was made, with which weights.

    Attributes:
        videos: All that were asked for.
        kept: How many of them were there already.
        adapters: Files, each with its scale.
    """

    videos: list[str]
    kept: int
    model: str
    adapters: dict[str, float]

    @property
    def exit_code(self) -> int:
        """Always 0: a video that cannot be made stops the command."""
        return 0

    def lines(self) -> list[str]:
        """Say where the videos are."""
        names = [f"{path} at {scale:g}" for path, scale in self.adapters.items()]
        what = f"{self.model} with {', '.join(names)}" if names else f"{self.model}, no adapter"
        kept = f" ({self.kept:,} of them existed)" if self.kept else ""
        return [
            f"{count(len(self.videos), 'video')}{kept} from {what}:",
            *(f"  {file}" for file in self.videos),
        ]


def run(config: SampleConfig, videos: list[Video]) -> SampleResult:
    """Make the videos.

    Args:
        config: The settings.
        videos: The videos to make, from `preflight.check`; none with saved latents.

    Raises:
        WanloraError: A setting, the device, the model or an adapter does not do.
    """
    if config.latents:
        model, videos = decode(config, config.latents)
        return _result(model, videos, videos, [])
    adapters = [read_scaled(text) for text in config.adapter]
    model = preflight.model_of(config, _provenances(adapters))
    device = select_device(config.device, model)
    if config.offload != "none" and device.type == "cpu":
        raise DeviceError(
            f"--offload {config.offload} moves parts of the model between a GPU and main memory, "
            "and everything is computed on the CPU here: leave it out"
        )
    warn_of_toy(model)
    folder = resolve(model, PIPELINE)
    variant = variant_of(folder)
    settings = video_settings(config, variant, adapters)
    _check_lengths(folder, [*(video.prompt for video in videos), settings.negative_prompt])
    fps = _fps(config, variant, adapters)
    logger.info(
        "videos of %d frames, %dx%d px, at %g fps%s",
        settings.num_frames, settings.width, settings.height, fps,
        ", as the adapter's clips unless set" if adapters else "",
    )  # fmt: skip
    made_with = _provenance(config, model, adapters, settings, device, fps)
    to_make = missing(videos, made_with) if config.skip_existing else videos
    if to_make:
        pipeline = _load(config, folder, adapters, device)
        _make(config, pipeline, to_make, settings, made_with)
    return _result(model, videos, to_make, adapters)


def _result(
    model: str, videos: list[Video], made: list[Video], adapters: list[ScaledAdapter]
) -> SampleResult:
    return SampleResult(
        videos=[str(video.path) for video in videos],
        kept=len(videos) - len(made),
        model=model,
        adapters={str(item.adapter.path): item.scale for item in adapters},
    )


def _provenances(adapters: Sequence[ScaledAdapter]) -> list[dict[str, str]]:
    return [item.adapter.provenance for item in adapters]


def _fps(config: SampleConfig, variant: Variant, adapters: Sequence[ScaledAdapter]) -> float:
    """Frames per second of the videos: as set, else as trained, else the cache's, else Wan's."""
    if fps := config.fps or preflight.trained_on(_provenances(adapters), "fps"):
        return fps
    if config.cache is not None:
        return frame_rate(read_view(config.cache, config.view).clips)
    return variant.fps


def video_settings(
    config: SampleConfig, variant: Variant, adapters: Sequence[ScaledAdapter] = ()
) -> wan.VideoSettings:
    """Complete the settings with the size of the adapters' clips, else the variant's defaults.

    Raises:
        ConfigError: Wan cannot take the size; diffusers would round it in silence.
    """
    size = preflight.video_size(config, variant, _provenances(adapters))
    defaults = wan.VideoSettings(
        num_frames=size.num_frames,
        height=size.height,
        width=size.width,
        steps=variant.steps,
        guidance_scale=variant.guidance_scale,
        negative_prompt=variant.negative_prompt,
    )
    given = {
        name: value for name in asdict(defaults) if (value := getattr(config, name)) is not None
    }
    return replace(defaults, **given)


def _check_lengths(folder: Path, prompts: Sequence[str]) -> None:
    """Refuse a prompt whose end the text encoder would never see."""
    tokenizer = load_tokenizer(folder)
    for prompt in dict.fromkeys(prompts):
        if (tokens := num_prompt_tokens(tokenizer, prompt)) > MAX_SEQUENCE_LENGTH:
            raise ConfigError(
                f"the prompt {shorten(prompt)} has {tokens} tokens; Wan reads at most "
                f"{MAX_SEQUENCE_LENGTH} and would ignore the rest: shorten it"
            )


def _load(
    config: SampleConfig, folder: Path, adapters: Sequence[ScaledAdapter], device: torch.device
) -> Any:
    """Load the pipeline, and put the adapters in before its parts are spread over memories."""
    if config.vae_tiling:
        logger.warning(
            "vae_tiling: each frame is decoded in overlapping tiles, which changes its pixels, at "
            "the tiles' seams visibly; leave it out where memory allows"
        )
    dtype = base_dtype(config.dtype, device)
    with waiting(f"loading the model in {folder}"):
        pipeline = wan.load_pipeline(folder, dtype=dtype, device=device, offload=config.offload)
    if adapters:
        attach(pipeline.transformer, adapters)
    wan.prepare(
        pipeline,
        device=device,
        shift=config.shift,
        offload=config.offload,
        vae_tiling=config.vae_tiling,
    )
    return pipeline


def _make(
    config: SampleConfig,
    pipeline: Any,
    videos: Sequence[Video],
    settings: wan.VideoSettings,
    made_with: dict[str, Any],
) -> None:
    """Make and write the videos, one by one: what is done when it is stopped stays."""
    total = len(videos) * settings.steps * (2 if config.compare else 1)
    logger.info(
        "to make: %s of %d frames, %dx%d px, %s each, in %s", count(len(videos), "video"),
        settings.num_frames, settings.height, settings.width, count(settings.steps, "step"),
        videos[0].path.parent,
    )  # fmt: skip
    with progress.bar(total=total, description="sample", unit="step") as bar:

        def generate(video: Video) -> UInt8[np.ndarray, "t h w 3"]:
            return wan.generate(
                pipeline, video.prompt, settings, seed=video.seed, on_step=lambda: bar.update(1)
            )

        for number, video in enumerate(videos):
            progress.show_figures(bar, f"video {number + 1}/{len(videos)}")
            frames = generate(video)
            if config.compare:
                with wan.base_alone(pipeline):
                    frames = side_by_side({"base": generate(video), _label(config): frames})
            recorded.write(video.path, frames, record=record_of(video, made_with))


def _label(config: SampleConfig) -> str:
    return " + ".join(Path(text).name for text in config.adapter)


def _provenance(
    config: SampleConfig,
    model: str,
    adapters: Sequence[ScaledAdapter],
    settings: wan.VideoSettings,
    device: torch.device,
    fps: float,
) -> dict[str, Any]:
    """Record what all videos of this command share: enough to make them again."""
    return {
        "model": model,
        "adapters": [item.record for item in adapters],
        "compare": config.compare,
        **asdict(settings),
        "shift": config.shift,
        "vae_tiling": config.vae_tiling,
        "fps": fps,
        "device": str(device),
        "dtype": str(base_dtype(config.dtype, device)).removeprefix("torch."),
        "versions": {"wanlora": __version__, **wan.versions()},
    }
