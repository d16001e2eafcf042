"""Settings of `wanlora sample`."""

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from wanlora.config.settings import (
    AdapterHigh,
    AdapterLow,
    BaseDtype,
    CacheLocation,
    Device,
    Guidance,
    GuidanceLow,
    Height,
    QuantizeAsTrained,
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

ACTIVITY = "{activity}"
"""Placeholder in a prompt for the name of each activity of a cache."""


class SampleConfig(Settings):
    """Generate videos from prompts, with the base model or with one or more adapters."""

    adapter: tuple[str, ...] = setting(
        (),
        "Run folder or adapter file, as PATH or PATH=SCALE (1 = as trained); repeat to add "
        "several together. In a model with two transformers, the header of each file names its "
        "expert. Without it, the base model is sampled.",
        flag="Input and output",
    )
    adapter_high: AdapterHigh = ()
    adapter_low: AdapterLow = ()
    prompt: tuple[str, ...] = setting(
        (),
        "Prompt; repeat for several. With --cache, {activity} in the prompt is replaced by each "
        "activity.",
        flag="Input and output",
    )
    prompts: Path | None = setting(
        None,
        "File of prompts: one per line (lines that start with # are skipped), or JSONL with "
        "`prompt` and optionally `seed` and `image`, such as a manifest.",
        flag="Input and output",
    )
    image: Path | None = setting(
        None,
        "Image that the videos start from, for an image-to-video model. It is scaled to cover the "
        "size of the videos and cropped around its centre.",
        flag="Input and output",
    )
    cache: CacheLocation | None = setting(
        None,
        "Cache whose activities are sampled, with one folder per activity: num_videos videos of "
        "each, with prompts from the captions of its held-out clips or from --prompt with "
        "{activity}. An image-to-video model starts from the first frames of these clips, unless "
        "--image is given.",
        flag="Input and output",
    )
    view: ViewName = "default"
    split: str = setting("val", "With --cache: split of the captions that are the prompts.")
    latents: Path | None = setting(
        None,
        "Instead of prompts: decode saved latents with the VAE. Folder of a run (its previews), "
        "folder of one step, or one file.",
        flag="Input and output",
    )
    model: str | None = model_setting(unset="the base model of the adapter")
    num_videos: int = setting(
        1, "Number of videos per prompt, with seeds seed, seed+1, ...", ge=1, flag="Videos"
    )
    compare: bool = setting(
        False,
        "Show the base model and the adapters side by side in each video, from the same noise; "
        "takes twice the time.",
        flag="Videos",
    )
    output_dir: Path = setting(
        Path("outputs/samples"), "Folder for the videos.", flag="Input and output"
    )
    output: Path | None = setting(
        None, "File for a single video; instead of output_dir.", flag="Input and output"
    )
    format: Literal["mp4", "webm", "gif", "frames"] = setting(
        "mp4", "File format. gif has 256 colours; frames are lossless PNG files."
    )
    overwrite: bool = setting(False, "Replace existing videos.", flag="Input and output")
    skip_existing: bool = setting(
        False,
        "Keep existing videos that were made with the same settings and make only the missing "
        "ones, for example to continue after an interruption.",
        flag="Input and output",
    )
    seed: int = seed_setting("Videos")
    num_frames: int | None = setting(
        None,
        "Frames per video, 4k+1.",
        ge=1,
        flag="Videos",
        unset="the most common number in the training clips of the adapter, otherwise the number "
        "of the variant",
    )
    height: Height = None
    width: Width = None
    steps: Steps = None
    guidance_scale: Guidance = None
    guidance_scale_low: GuidanceLow = None
    shift: float | None = setting(
        None,
        "Shift of sigma.",
        gt=0,
        flag="Videos",
        unset="that of the variant for the size: 3 at 480p and 5 at 720p for Wan2.1, 12 for Wan2.2",
    )
    negative_prompt: str | None = setting(
        None, "Content to avoid.", flag="Videos", unset="that of the variant"
    )
    fps: float | None = setting(
        None,
        "Frames per second of the videos.",
        gt=0,
        flag="Videos",
        unset="that of the training clips of the adapter, of the cache or of the latents, "
        "otherwise of the variant",
    )
    device: Device = "auto"
    dtype: BaseDtype = "auto"
    quantize: QuantizeAsTrained = None
    stream_blocks: StreamBlocks = "auto"
    offload: Literal["auto", "none", "model", "sequential"] = setting(
        "auto",
        "For GPUs with little memory: keep one part of the pipeline on the GPU at a time (model), "
        "or one layer (sequential; slow). auto: none if all parts fit, otherwise model.",
        flag="Model and machine",
    )
    vae_tiling: bool = setting(
        False, "Decode in tiles to save memory; changes pixels, visibly at the seams."
    )

    @model_validator(mode="after")
    def _prompts_or_latents(self) -> Self:
        if self.latents is not None:
            used = {"latents", "model", "output_dir", "overwrite", "fps", "device"}
            if unused := sorted(self.model_fields_set - used):
                names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
                raise ValueError(f"latents are already denoised, so leave out {names}")
        elif not self.prompt and self.prompts is None and self.cache is None:
            raise ValueError(
                "nothing to sample: pass --prompt, --prompts FILE, --cache CACHE, or --latents "
                "with the previews of a run"
            )
        return self

    @model_validator(mode="after")
    def _each_setting_has_an_effect(self) -> Self:
        templates = [prompt for prompt in self.prompt if ACTIVITY in prompt]
        if templates and self.cache is None:
            raise ValueError(
                f"the prompt {templates[0]!r} is for each activity of a cache: pass --cache too"
            )
        if self.cache is not None and self.prompt and not templates:
            raise ValueError(f"with --cache, a --prompt needs {ACTIVITY} in it; leave out one")
        if self.compare and not (self.adapter or self.adapter_high or self.adapter_low):
            raise ValueError("--compare shows base model and adapter: pass --adapter too")
        refuse_guidance_without_effect(self.guidance_scale, self.guidance_scale_low)
        if self.overwrite and self.skip_existing:
            raise ValueError("--overwrite replaces videos and --skip-existing keeps them: pass one")
        return self
