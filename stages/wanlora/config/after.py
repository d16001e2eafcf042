"""What comes of an adapter: `sample`, `evaluate`; and `demo`, which does it all."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from wanlora.config.settings import CacheDir, CacheLocation, Device, Flag, Seed, Settings, ViewName

ACTIVITY = "{activity}"
"""Stands in a prompt for the name of each activity of a cache."""

BaseDtype = Annotated[
    Literal["auto", "bfloat16", "float32"],
    Field(description="Type of the transformer; auto = bfloat16 on a GPU, float32 on a CPU."),
]
Steps = Annotated[
    int | None,
    Field(description="Denoising steps; None = the variant's.", ge=1),
    Flag(heading="Videos"),
]
Guidance = Annotated[
    float | None,
    Field(description="Classifier-free guidance; None = the variant's.", ge=0),
    Flag(heading="Videos"),
]


class SampleConfig(Settings):
    """Base model, or base and adapters, and prompts to mp4."""

    adapter: Annotated[
        tuple[str, ...],
        Field(
            description="Run folder or adapter file, PATH or PATH=SCALE (1 = as trained); repeat "
            "to add several up. Without it the base model is sampled."
        ),
        Flag(heading="Input and output"),
    ] = ()
    prompt: Annotated[
        tuple[str, ...],
        Field(
            description="What to show; repeat for several. With --cache, {activity} in it stands "
            "for each activity."
        ),
        Flag(heading="Input and output"),
    ] = ()
    prompts: Annotated[
        Path | None,
        Field(
            description="File of prompts: one per line (lines that start with # are skipped), or "
            "JSONL with `prompt` and optionally `seed`, such as a manifest."
        ),
        Flag(heading="Input and output"),
    ] = None
    cache: Annotated[
        CacheLocation | None,
        Field(
            description="Cache whose activities are sampled, a folder each: num_videos of every "
            "activity, from the captions of its held-out clips, or --prompt with {activity}."
        ),
        Flag(heading="Input and output"),
    ] = None
    view: ViewName = "default"
    split: Annotated[str, Field(description="Whose captions --cache takes.")] = "val"
    latents: Annotated[
        Path | None,
        Field(
            description="Instead of prompts: decode the previews of a run, of one step, or one "
            "file of latents with the VAE."
        ),
        Flag(heading="Input and output"),
    ] = None
    model: Annotated[
        str | None,
        Field(description="micro, a local diffusers folder or a hub id; None = the adapter's."),
        Flag(heading="Model and machine"),
    ] = None
    num_videos: Annotated[
        int, Field(description="Videos for each prompt, with seeds seed, seed+1, ...", ge=1),
        Flag(heading="Videos"),
    ] = 1  # fmt: skip
    compare: Annotated[
        bool,
        Field(
            description="Base and adapters beside each other in each video, from the same noise; "
            "costs twice the time."
        ),
        Flag(heading="Videos"),
    ] = False
    output_dir: Annotated[
        Path, Field(description="Folder for the videos."), Flag(heading="Input and output")
    ] = Path("outputs/samples")
    output: Annotated[
        Path | None,
        Field(description="Name of the one video; instead of output_dir."),
        Flag(heading="Input and output"),
    ] = None
    format: Annotated[
        Literal["mp4", "webm", "gif", "frames"],
        Field(description="Kind of file; gif has 256 colours, frames are PNGs, exact to the bit."),
    ] = "mp4"
    overwrite: Annotated[
        bool, Field(description="Replace videos that exist."), Flag(heading="Input and output")
    ] = False
    skip_existing: Annotated[
        bool,
        Field(
            description="Keep videos that exist and were made with the same settings, and make the "
            "others: continues a run that was stopped."
        ),
        Flag(heading="Input and output"),
    ] = False
    seed: Annotated[Seed, Flag(heading="Videos")] = 0
    num_frames: Annotated[
        int | None,
        Field(
            description="Frames, 4k+1; None = those of most clips the adapter was trained on, else "
            "the variant's.",
            ge=1,
        ),
        Flag(heading="Videos"),
    ] = None
    height: Annotated[
        int | None, Field(description="px; None = as num_frames."), Flag(heading="Videos")
    ] = None
    width: Annotated[
        int | None, Field(description="px; None = as num_frames."), Flag(heading="Videos")
    ] = None
    steps: Steps = None
    guidance_scale: Guidance = None
    shift: Annotated[
        float | None,
        Field(
            description="Shift of sigma; None = the model's scheduler's (3 at 480p; use 5 at "
            "720p).",
            gt=0,
        ),
        Flag(heading="Videos"),
    ] = None
    negative_prompt: Annotated[
        str | None,
        Field(description="What to avoid; None = the variant's."),
        Flag(heading="Videos"),
    ] = None
    fps: Annotated[
        float | None,
        Field(
            description="Frames per second of the videos; None = that of the clips the adapter was "
            "trained on, or of the cache or latents, else the variant's.",
            gt=0,
        ),
        Flag(heading="Videos"),
    ] = None
    device: Device = "auto"
    dtype: BaseDtype = "auto"
    offload: Annotated[
        Literal["none", "model", "sequential"],
        Field(
            description="For small cards: keep one part of the pipeline on the GPU at a time "
            "(model), or one layer (sequential, slow)."
        ),
        Flag(heading="Model and machine"),
    ] = "none"
    vae_tiling: Annotated[
        bool,
        Field(description="Decode in tiles to save memory; changes pixels, at the seams visibly."),
    ] = False

    @model_validator(mode="after")
    def _prompts_or_latents(self) -> Self:
        if self.latents is not None:
            used = {"latents", "model", "output_dir", "overwrite", "fps", "device"}
            if unused := sorted(self.model_fields_set - used):
                names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
                raise ValueError(f"latents are already denoised, so leave out {names}")
        elif not self.prompt and self.prompts is None and self.cache is None:
            raise ValueError(
                "nothing to sample: pass --prompt, --prompts FILE, --cache CACHE, or --latents of "
                "a run's previews"
            )
        return self

    @model_validator(mode="after")
    def _each_setting_has_an_effect(self) -> Self:
        templates = [prompt for prompt in self.prompt if ACTIVITY in prompt]
        if templates and self.cache is None:
            raise ValueError(
                f"the prompt {templates[0]!r} stands for every activity: pass --cache, whose "
                "activities they are"
            )
        if self.cache is not None and self.prompt and not templates:
            raise ValueError(f"with --cache, a --prompt needs {ACTIVITY} in it; leave out one")
        if self.compare and not self.adapter:
            raise ValueError("--compare shows base and adapter: pass --adapter too")
        if self.overwrite and self.skip_existing:
            raise ValueError("--overwrite replaces videos and --skip-existing keeps them: pass one")
        return self


class EvaluateConfig(Settings):
    """Base model against adapters: held-out loss, videos of each activity, and a report."""

    adapter: Annotated[
        tuple[str, ...],
        Field(
            description="Run folder or adapter file, PATH or PATH=SCALE; repeat to compare "
            "several.",
            min_length=1,
        ),
        Flag(heading="Input and output"),
    ]
    checkpoints: Annotated[
        bool,
        Field(description="Compare the checkpoints of each run, and its best, too."),
        Flag(heading="Input and output"),
    ] = False
    cache: CacheDir = Path("cache")
    view: ViewName = "default"
    split: Annotated[
        str, Field(description="Clips the loss is measured on, and whose captions are prompts.")
    ] = "val"
    model: Annotated[
        str | None,
        Field(description="micro, a local diffusers folder or a hub id; None = the view's model."),
        Flag(heading="Model and machine"),
    ] = None
    output_dir: Annotated[
        Path,
        Field(description="Folder for evaluation.json, report.html and videos/."),
        Flag(heading="Input and output"),
    ] = Path("outputs/evaluation")
    base_videos: Annotated[
        Path | None,
        Field(
            description="Folder where the base model's videos are kept, for every evaluation to "
            "use again; None = base-videos/ beside output_dir."
        ),
    ] = None
    videos_per_activity: Annotated[
        int,
        Field(description="Videos of each activity by each model; 0 = only the loss.", ge=0),
        Flag(heading="Videos"),
    ] = 10
    num_clips: Annotated[int, Field(description="Held-out clips in the loss.", ge=1), Flag()] = 16
    num_sigmas: Annotated[int, Field(description="Noise levels a clip.", ge=1)] = 8
    sampler: Annotated[
        Literal["logit_normal", "uniform", "mode"],
        Field(description="Density whose quantiles the noise levels are; as in training."),
    ] = "logit_normal"
    shift: Annotated[
        float | None,
        Field(description="Shift of sigma, in loss and videos; None = the view's.", gt=0),
    ] = None
    seed: Annotated[Seed, Flag(heading="Videos")] = 0
    num_frames: Annotated[
        int | None, Field(description="Frames of the videos, 4k+1; None = most clips'.", ge=1),
        Flag(heading="Videos"),
    ] = None  # fmt: skip
    height: Annotated[
        int | None, Field(description="px; None = most clips'."), Flag(heading="Videos")
    ] = None
    width: Annotated[
        int | None, Field(description="px; None = most clips'."), Flag(heading="Videos")
    ] = None
    steps: Steps = None
    guidance_scale: Guidance = None
    fps: Annotated[
        float | None,
        Field(description="Frames per second of the videos; None = most held-out clips'.", gt=0),
        Flag(heading="Videos"),
    ] = None
    shown_per_activity: Annotated[
        int,
        Field(description="Videos of each activity inside report.html; all are in videos/.", ge=0),
    ] = 4
    html_clips: Annotated[
        int,
        Field(description="Maximum number of prompts with videos inside report.html.", ge=1),
    ] = 200
    shown_height: Annotated[
        int, Field(description="Greatest height in px of a video inside report.html.", ge=16)
    ] = 320
    device: Device = "auto"
    dtype: BaseDtype = "auto"


class DemoConfig(Settings):
    """The whole pipeline on the embedded micro model and drawn videos, minutes on a CPU."""

    output_dir: Annotated[
        Path, Field(description="Folder for everything the demo makes."), Flag()
    ] = Path("outputs/demo")
    concept: Annotated[
        Literal["clapping", "striped", "triangle"],
        Field(description="What to teach: none of them has the base ever seen."),
        Flag(),
    ] = "clapping"
    max_steps: Annotated[int, Field(description="Training steps.", ge=1), Flag()] = 200
    known_videos: Annotated[
        int,
        Field(
            description="Videos of what the base knows, mixed in so that it is not forgotten.",
            ge=0,
        ),
        Flag(),
    ] = 24
    seed: Annotated[Seed, Flag()] = 0
