"""Settings of `wanlora evaluate`."""

from pathlib import Path
from typing import Self

from pydantic import model_validator

from wanlora.config.settings import (
    AdapterHigh,
    AdapterLow,
    BaseDtype,
    CacheDir,
    Device,
    Guidance,
    GuidanceLow,
    Height,
    QuantizeAsTrained,
    Sampler,
    Settings,
    Steps,
    StreamBlocks,
    ViewName,
    Width,
    model_setting,
    refuse_guidance_without_effect,
    seed_setting,
    setting,
)


class EvaluateConfig(Settings):
    """Compare adapters with the base model: held-out loss, videos per activity, and a report."""

    adapter: tuple[str, ...] = setting(
        (),
        "Run folder or adapter file, as PATH or PATH=SCALE; repeat to compare several. In a model "
        "with two transformers, one for each expert: the header of each file names its expert.",
        flag="Input and output",
    )
    adapter_high: AdapterHigh = ()
    adapter_low: AdapterLow = ()
    checkpoints: bool = setting(
        False, "Also compare the checkpoints of each run, and its best.", flag="Input and output"
    )
    cache: CacheDir = Path("cache")
    view: ViewName = "default"
    split: str = setting("val", "Split of the clips for losses and of the captions for prompts.")
    model: str | None = model_setting(unset="the model of the view")
    output_dir: Path = setting(
        Path("outputs/evaluation"),
        "Folder for evaluation.json, report.html and videos/.",
        flag="Input and output",
    )
    base_videos: Path | None = setting(
        None,
        "Folder for the videos of the base model, which later evaluations use again.",
        unset="base-videos/ next to output_dir",
    )
    videos_per_activity: int = setting(
        10, "Videos per activity and model; 0 = only the loss.", ge=0, flag="Videos"
    )
    num_clips: int = setting(16, "Number of held-out clips for the loss.", ge=1, flag="Options")
    num_sigmas: int = setting(8, "Number of noise levels per clip.", ge=1)
    sampler: Sampler = setting(
        "logit_normal", "Distribution whose quantiles are the noise levels; as in training."
    )
    shift: float | None = setting(
        None,
        "Shift of sigma, for the loss and the videos.",
        gt=0,
        unset="the shift of the variant for the size of most clips",
    )
    seed: int = seed_setting("Videos")
    num_frames: int | None = setting(
        None,
        "Frames per video, 4k+1.",
        ge=1,
        flag="Videos",
        unset="the most common number in the clips",
    )
    height: Height = None
    width: Width = None
    steps: Steps = None
    guidance_scale: Guidance = None
    guidance_scale_low: GuidanceLow = None
    fps: float | None = setting(
        None,
        "Frames per second of the videos.",
        gt=0,
        flag="Videos",
        unset="the most common value in the held-out clips",
    )
    shown_per_activity: int = setting(
        4, "Videos per activity in report.html; all are in videos/.", ge=0
    )
    html_clips: int = setting(200, "Maximum number of prompts with videos in report.html.", ge=1)
    shown_height: int = setting(320, "Maximum height in pixels of videos in report.html.", ge=16)
    device: Device = "auto"
    dtype: BaseDtype = "auto"
    quantize: QuantizeAsTrained = None
    stream_blocks: StreamBlocks = "auto"

    @model_validator(mode="after")
    def _has_an_adapter_and_guidance_with_an_effect(self) -> Self:
        if not (self.adapter or self.adapter_high or self.adapter_low):
            raise ValueError("--adapter is required: the run folder or file to compare")
        refuse_guidance_without_effect(self.guidance_scale, self.guidance_scale_low)
        return self
