"""`wanlora sample`, in order: check, load, then generate each video and write it with its record.

Owns: what is loaded and with which settings. The videos are those of plain diffusers with the same
files, bit for bit.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from wanlora import progress
from wanlora.adapters.attach import ScaledAdapter, attach_by_expert
from wanlora.adapters.routing import EXPERTS
from wanlora.commands.sample.pixels import Picture, first_frames
from wanlora.commands.sample.saved_previews import decode
from wanlora.commands.sample.setup import Setup, check_lengths, open_setup
from wanlora.commands.sample.videos import Video, missing, record_of
from wanlora.config import SampleConfig
from wanlora.core.out_of_memory import explained_out_of_memory
from wanlora.core.units import count
from wanlora.cost.memory import Quantize
from wanlora.media import recorded
from wanlora.media.side_by_side import side_by_side
from wanlora.progress import waiting
from wanlora.wan import pipeline as wan
from wanlora.wan.placement import Placement

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SampleResult:
    """Videos, and the weights that they were made with.

    Attributes:
        videos: All requested videos.
        kept: Number of videos that existed before.
        model: The model.
        adapters: Scale of each adapter, by file.
        experts: Files of the adapters of each expert, in a model with two transformers.
        images: First frames of the videos: sha256 of each image file, or key of each cached clip.
    """

    videos: list[str]
    kept: int
    model: str
    adapters: dict[str, float]
    experts: dict[str, list[str]]
    images: dict[str, str]

    @property
    def exit_code(self) -> int:
        """Always 0: a video that cannot be made stops the command."""
        return 0

    def lines(self) -> list[str]:
        """List the videos."""
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
        videos: The videos to make, from `preflight.check`; empty with saved latents.

    Raises:
        WanloraError: A setting, the device, the model or an adapter cannot be used.
    """
    if config.latents:
        model, videos = decode(
            config.latents, model=config.model, output_dir=config.output_dir,
            overwrite=config.overwrite, fps=config.fps, device=config.device,
        )  # fmt: skip
        return _result(model, videos, videos, ())
    setup, videos = open_setup(config, videos)
    settings = setup.settings
    check_lengths(setup.folder, [*(video.prompt for video in videos), settings.negative_prompt])
    logger.info(
        "videos of %d frames, %dx%d px, at %g fps%s",
        settings.num_frames, settings.width, settings.height, setup.fps,
        ", as the adapter's clips unless set" if setup.adapters else "",
    )  # fmt: skip
    to_make = missing(videos, setup.record) if config.skip_existing else videos
    if to_make:
        with explained_out_of_memory(partial(_save_memory, setup.placement, setup.quantize)):
            images = first_frames(
                to_make, height=settings.height, width=settings.width, folder=setup.folder,
                variant=setup.variant, device=setup.device,
            )  # fmt: skip
            _make(setup, _load(setup), to_make, images, label=_label(config))
    return _result(setup.model, videos, to_make, setup.adapters)


def _result(
    model: str, videos: list[Video], made: list[Video], adapters: Sequence[ScaledAdapter]
) -> SampleResult:
    return SampleResult(
        videos=[str(video.path) for video in videos],
        kept=len(videos) - len(made),
        model=model,
        adapters={str(item.adapter.path): item.scale for item in adapters},
        experts={
            expert: [str(item.adapter.path) for item in adapters if item.expert == expert]
            for expert in EXPERTS
            if any(item.expert for item in adapters)
        },
        images={video.image.name: video.image.key for video in videos if video.image},
    )


def _save_memory(placement: Placement, quantize: Quantize, reason: str) -> str:
    """Name the options of a command that ran out of memory."""
    options = [
        *(
            ["--offload model (one part of the pipeline on the GPU at a time)"]
            if placement.offload == "none"
            else []
        ),
        f"--stream-blocks N with N > {placement.num_streamed}",
        *(["--quantize int8 (the videos change slightly)"] if quantize == "none" else []),
        "--set vae_tiling=true, if it happens after the last step", "fewer --num-frames",
        "a smaller --height and --width",
    ]  # fmt: skip
    return (
        f"out of memory ({reason}). Finished videos are kept, and --skip-existing continues after "
        f"them. Options: {'; '.join(options)}"
    )


def _label(config: SampleConfig) -> str:
    """Name of the adapters in a comparison, from the values of their flags."""
    texts = (*config.adapter, *config.adapter_high, *config.adapter_low)
    return " + ".join(Path(text).name for text in texts)


def _load(setup: Setup) -> Any:
    """Load the pipeline, and add the adapters before its parts are moved between memories."""
    if setup.vae_tiling:
        logger.warning(
            "vae_tiling: each frame is decoded in overlapping tiles. This changes its pixels, "
            "visibly at the tiles' seams. Do not set it if memory suffices"
        )
    with waiting(f"loading the model in {setup.folder}"):
        pipeline = wan.load_pipeline(
            setup.folder,
            dtype=setup.dtype,
            device=setup.device,
            offload=setup.placement.offload,
            num_streamed=setup.placement.num_streamed,
            quantize=setup.quantize,
        )
    attach_by_expert(wan.transformers_of(pipeline), setup.adapters)
    wan.prepare(
        pipeline,
        device=setup.device,
        shift=setup.shift,
        offload=setup.placement.offload,
        vae_tiling=setup.vae_tiling,
    )
    return pipeline


def _make(
    setup: Setup,
    pipeline: Any,
    videos: Sequence[Video],
    images: Mapping[str, Picture],
    *,
    label: str,
) -> None:
    """Make and write the videos one by one. If the command is stopped, the finished ones remain.

    Args:
        setup: Values that are the same for all videos.
        pipeline: Pipeline with the adapters.
        videos: Videos to make; at least one.
        images: Pixels of their first frames.
        label: Name of the adapters in a comparison.
    """
    settings, made_with = setup.settings, setup.record
    total = len(videos) * settings.steps * (2 if setup.compare else 1)
    logger.info(
        "to make: %s of %d frames, %dx%d px, %s each, in %s", count(len(videos), "video"),
        settings.num_frames, settings.height, settings.width, count(settings.steps, "step"),
        videos[0].path.parent,
    )  # fmt: skip
    with progress.bar(total=total, description="sample", unit="step") as bar:

        def generate(video: Video) -> UInt8[np.ndarray, "t h w 3"]:
            return wan.generate(
                pipeline,
                video.prompt,
                settings,
                seed=video.seed,
                image=images[video.image.key] if video.image else None,
                on_step=lambda: bar.update(1),
            )

        for number, video in enumerate(videos):
            progress.show_figures(bar, f"video {number + 1}/{len(videos)}")
            frames = generate(video)
            if setup.compare:
                with wan.base_alone(pipeline):
                    frames = side_by_side({"base": generate(video), label: frames})
            recorded.write(video.path, frames, record=record_of(video, made_with))
