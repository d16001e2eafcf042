"""Every setting of every command: name, default, bounds, unit and description, written once.

Owns: defaults and their documentation; flags and docs are made from these models.
Must not know: torch, or any library code. Precedence: default < TOML < --set < flag.
"""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from wanlora.core import location
from wanlora.core.buckets import Bucket, problem_with
from wanlora.core.location import Url
from wanlora.errors import ConfigError

DEFAULT_MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


class Flag:
    """Marks a field that a person types every day: the command line gives it these names.

    Args:
        names: Option names; empty for the field's own name with hyphens. A name after the first
            is an alias.
        argument: Whether it is positional.
        bare: Value that the option stands for when none follows it.
    """

    def __init__(self, *names: str, argument: bool = False, bare: str = "") -> None:
        self.names = names
        self.argument = argument
        self.bare = bare


class Settings(BaseModel):
    """Frozen, and closed: an unknown key is an error, not a surprise."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Device = Annotated[
    str,
    Field(
        description="Where to compute: auto, cpu, cuda, cuda:1, mps. auto never falls back to a "
        "CPU for a model other than micro.",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
    ),
    Flag(),
]
Seed = Annotated[int, Field(ge=0, lt=2**63, description="Seed of every random draw."), Flag()]
CacheLocation = Annotated[
    Path | Url,
    BeforeValidator(location.parse),
    PlainSerializer(str, return_type=str),
]
CacheDir = Annotated[
    CacheLocation,
    Field(
        description="Cache folder, holding store.zarr and views/; or a URL such as "
        "s3://bucket/prefix (docs/cache.md)."
    ),
    Flag("--cache"),
]
ViewName = Annotated[
    str,
    Field(
        description="Name of the view in CACHE/views: letters, digits and . _ -",
        pattern=r"^[A-Za-z0-9][\w.-]*$",
    ),
    Flag(),
]


TokenizerOf = Annotated[
    str,
    Field(
        description="Model whose tokenizer counts captions, if it is on this machine; else an "
        "estimate, marked as such."
    ),
    Flag(),
]


class PrepareConfig(Settings):
    """Videos and captions to a manifest; the pixels stay in the source videos."""

    sources: Annotated[
        tuple[Path, ...],
        Field(description="Folders of videos or images, or single files.", min_length=1),
        Flag(argument=True),
    ]
    output: Annotated[
        Path, Field(description="Folder for train.jsonl, val.jsonl and errors.jsonl."),
        Flag("--output", "--output-dir"),
    ] = Path("data/processed")  # fmt: skip
    captions: Annotated[
        Path | None,
        Field(
            description="JSONL, JSON or CSV with a path and a caption for each video; "
            "without it, a .txt beside each video, or a table in its folder (metadata.jsonl, "
            "metadata.csv, captions.json, prompts.txt with videos.txt ...)."
        ),
        Flag(),
    ] = None
    caption_prefix: Annotated[
        str,
        Field(description="Trigger words put before every caption that does not start with them."),
        Flag(),
    ] = ""
    num_frames: Annotated[int, Field(description="Frames in a clip, 4k+1.", ge=1), Flag()] = 81
    height: Annotated[int, Field(description="Clip height in px, a multiple of 16."), Flag()] = 480
    width: Annotated[int, Field(description="Clip width in px, a multiple of 16."), Flag()] = 832
    fps: Annotated[float, Field(description="Frames a second of a clip.", gt=0), Flag()] = 16.0
    buckets: Annotated[
        bool,
        Field(
            description="Keep each video's aspect: the size of most kept pixels with an area of at "
            "most height x width, multiples of 16, portrait too; short videos become 17, 33, 49 "
            "... frames."
        ),
        Flag(),
    ] = False
    mode: Annotated[
        Literal["chunk", "head", "middle", "slide", "uniform"],
        Field(
            description="chunk: as many clips as fit, end to end; head, middle: one; slide: one "
            "every `stride` frames; uniform: `count`, spread evenly."
        ),
        Flag(),
    ] = "chunk"
    stride: Annotated[
        int | None,
        Field(description="slide: frames from clip to clip; None = half a clip.", ge=1),
        Flag(),
    ] = None
    count: Annotated[int, Field(description="uniform: clips of a video.", ge=1), Flag()] = 4
    short: Annotated[
        Literal["trim", "drop"],
        Field(
            description="A video or scene shorter than a clip: trim it to the longest 4k+1 "
            "frames (at least min_frames), or drop it."
        ),
        Flag(),
    ] = "trim"
    min_frames: Annotated[
        int, Field(description="Shortest clip that trim may leave, 4k+1 frames.", ge=1)
    ] = 17
    scenes: Annotated[
        Literal["builtin", "pyscenedetect", "allow"],
        Field(
            description="No clip crosses a scene cut. builtin finds near-certain hard cuts, "
            "pyscenedetect (pip install 'wanlora[scenes]') more; allow: clips may cross cuts, "
            "with a warning."
        ),
        Flag(),
    ] = "builtin"
    val_fraction: Annotated[
        float,
        Field(description="Share of source videos held out for validation.", ge=0, lt=1),
        Flag(),
    ] = 0.05
    group_pattern: Annotated[
        str | None,
        Field(
            description="Regex whose first group names the source of an .npz clip by its stem, so "
            "that clips of one video never stand on both sides of the split."
        ),
    ] = None
    allow_hdr: Annotated[
        bool, Field(description="Accept HDR (PQ, HLG) video although nothing tone-maps it.")
    ] = False
    allow_low_fps: Annotated[
        bool, Field(description="Accept video of fewer frames a second than fps: frames repeat.")
    ] = False
    max_error_rate: Annotated[
        float,
        Field(description="Exit with 3 when more than this share of the sources fails.", ge=0),
    ] = 0.0
    workers: Annotated[
        int,
        Field(
            description="Processes that check files; 0 = one a core. 1 = this process, which a bad "
            "file could then crash or hang.",
            ge=0,
        ),
        Flag(),
    ] = 0
    stall_s: Annotated[
        float, Field(description="A file whose decoding stands still for so long fails.", gt=0)
    ] = 60.0
    dry_run: Annotated[
        bool, Field(description="Check everything, show the plan, write no manifest."), Flag()
    ] = False
    html: Annotated[
        Path | None, Field(description="Write a contact sheet of all clips to this file."), Flag()
    ] = None
    materialize: Annotated[
        Literal["npz"] | None,
        Field(description="Also write every clip's frames to OUTPUT/clips, 97 MB each at 480p."),
        Flag(),
    ] = None
    model: TokenizerOf = DEFAULT_MODEL
    seed: Seed = 0

    @model_validator(mode="after")
    def _sizes_fit_wan(self) -> Self:
        for frames in (self.num_frames, self.min_frames):
            if problem := problem_with(Bucket(frames, self.height, self.width)):
                raise ValueError(problem)
        return self


class VerifyConfig(Settings):
    """Load clips exactly as stage one will, and list what could not be used and why."""

    manifests: Annotated[
        tuple[Path, ...],
        Field(description="Manifest files, or a folder holding train.jsonl and val.jsonl."),
        Flag(argument=True),
    ] = (Path("data/processed"),)
    limit: Annotated[
        int,
        Field(description="Load only the first N clips of each manifest; 0 = all.", ge=0),
        Flag(),
    ] = 0
    html: Annotated[
        Path | None,
        Field(description="Write a contact sheet of the clips loaded to this file."),
        Flag(),
    ] = None
    model: TokenizerOf = DEFAULT_MODEL


class StoreSettings(Settings):
    """How tensors lie in the store."""

    dtype: Annotated[
        Literal["float16", "float32"], Field(description="Type of stored latents and embeddings.")
    ] = "float16"
    clips_per_segment: Annotated[
        int, Field(description="Most clips in a segment (an object of the store).", ge=1, le=512)
    ] = 32
    segment_bytes: Annotated[
        int, Field(description="Most raw bytes in a segment.", ge=1)
    ] = 128 * 2**20  # fmt: skip
    segment_s: Annotated[
        float, Field(description="Most seconds of work in a segment: what a kill can cost.", gt=0)
    ] = 120.0
    latent_mantissa_bits: Annotated[
        int | None,
        Field(
            description="Round latents to so many bits of mantissa before storing; 7 is bfloat16's "
            "accuracy and saves a fifth of the disk. None = keep all.",
            ge=1,
            le=22,
        ),
    ] = None
    logvar: Annotated[
        bool,
        Field(
            description="Also store the log-variances of the posterior, in an array beside the "
            "latents; doubles their size. Training does not read them."
        ),
    ] = False

    @model_validator(mode="after")
    def _bits_fit_the_type(self) -> Self:
        if self.dtype == "float16" and (self.latent_mantissa_bits or 0) > 10:
            raise ValueError(
                f"latent_mantissa_bits {self.latent_mantissa_bits}: float16 has 10 bits"
            )
        return self


class CacheLatentsConfig(Settings):
    """Stage one: run the VAE and the text encoder once over every clip and caption."""

    manifest: Annotated[
        tuple[Path, ...],
        Field(description="Manifest; repeat for several. A folder stands for its train and val."),
        Flag(),
    ] = (Path("data/processed"),)
    cache: CacheDir = Path("cache")
    model: Annotated[
        str,
        Field(description="micro (embedded), a local diffusers folder, or a hub id."),
        Flag(),
    ] = DEFAULT_MODEL
    device: Device = "auto"
    view: ViewName = "default"
    dry_run: Annotated[bool, Field(description="Say what would be encoded, and stop."), Flag()] = (
        False
    )
    vae_dtype: Annotated[
        Literal["float32", "bfloat16"],
        Field(description="Compute type of the VAE; bfloat16 costs about 1 % accuracy."),
    ] = "float32"
    tf32: Annotated[bool, Field(description="Allow TF32 in the fp32 VAE on a GPU that has it.")] = (
        True
    )
    text_dtype: Annotated[
        Literal["bfloat16", "float32"], Field(description="Compute type of the text encoder.")
    ] = "bfloat16"
    validation_prompts: Annotated[
        tuple[str, ...], Field(description="More prompts to encode, for previews while training.")
    ] = ()
    decode_workers: Annotated[
        int, Field(description="Threads that decode clips ahead of the encoder.", ge=1, le=64)
    ] = 4
    decode_bytes: Annotated[
        int, Field(description="Most bytes of decoded clips waiting for the encoder.", ge=1)
    ] = 2**30
    decode_check: Annotated[
        bool,
        Field(
            description="Decode the first clip back and refuse a VAE that cannot (PSNR under the "
            "variant's limit)."
        ),
    ] = True
    store: StoreSettings = StoreSettings()


class InspectConfig(Settings):
    """What is in a cache: counts, sizes, statistics, pictures; whether it is whole; mend, clean."""

    cache: Annotated[
        CacheLocation, Field(description="Cache folder or URL."), Flag(argument=True)
    ] = Path("cache")
    verify: Annotated[
        Literal["fast", "full"] | None,
        BeforeValidator(lambda value: {True: "full", False: None}.get(value, value)),
        Field(
            description="fast: commit records and the sizes of objects; full (--verify alone): "
            "read every row, checksum, finite, not constant."
        ),
        Flag(bare="full"),
    ] = None
    repair: Annotated[
        bool,
        Field(description="Verify in full, drop what is bad, and encode just that again."),
        Flag(),
    ] = False
    gc: Annotated[
        bool,
        Field(description="Free what no view names, repeated rows, and what kills have left."),
        Flag(),
    ] = False
    dry_run: Annotated[
        bool, Field(description="With --gc: say what would be freed, and stop."), Flag()
    ] = False
    html: Annotated[
        Path | None,
        Field(description="Write a page with a picture strip, caption and statistics per clip."),
        Flag(),
    ] = None
    decode: Annotated[
        tuple[str, ...],
        Field(
            description="Clip id, or the start of a key: decode it with the VAE to an mp4 beside "
            "its source; repeat for several."
        ),
        Flag(),
    ] = ()
    output_dir: Annotated[Path, Field(description="Folder for decoded clips."), Flag()] = Path(
        "outputs/decoded"
    )
    manifest: Annotated[
        tuple[Path, ...],
        Field(description="With --repair: the manifests that the cache was made from."),
        Flag(),
    ] = (Path("data/processed"),)
    device: Device = "auto"
    statistics_clips: Annotated[
        int,
        Field(
            description="Clips of each bucket that statistics are taken over, evenly spaced; "
            "--verify full and --html take all.",
            ge=0,
        ),
    ] = 32
    html_clips: Annotated[int, Field(description="Most clips on the page.", ge=1)] = 1000
    gc_min_age_h: Annotated[
        float,
        Field(
            description="Hours that unnamed rows and half-written segments are left alone, for a "
            "writer may be at work on them.",
            ge=0,
        ),
    ] = 24.0
    store: StoreSettings = StoreSettings()

    @model_validator(mode="after")
    def _one_job(self) -> Self:
        if self.repair and self.gc:
            raise ValueError("repair and gc: run one after the other")
        if self.dry_run and not self.gc:
            raise ValueError("dry_run goes with gc")
        return self


class LoraSettings(Settings):
    """The adapter: where it sits and how large it is."""

    rank: Annotated[int, Field(description="Rank r.", ge=1)] = 32
    alpha: Annotated[
        float | None, Field(description="Scale numerator; the adapter is scaled by alpha/rank. "
                            "None = rank.", gt=0)
    ] = None  # fmt: skip
    targets: Annotated[
        str | tuple[str, ...],
        Field(
            description="attention, attention+ffn, all-linear; or a regex (matched against whole "
            "module names), or a list of name suffixes, each of which must match."
        ),
    ] = "attention+ffn"
    rslora: Annotated[bool, Field(description="Scale by alpha/sqrt(rank) instead.")] = False
    dora: Annotated[bool, Field(description="Train magnitudes beside directions (DoRA).")] = False


class FlowSettings(Settings):
    """Which noise levels are trained, how often, and with which weight."""

    sampler: Annotated[
        Literal["logit_normal", "uniform", "mode"], Field(description="Density of sigma.")
    ] = "logit_normal"
    shift: Annotated[
        float | None,
        Field(description="Shift of sigma; None = the variant's (3 at 480p; use 5 at 720p).", gt=0),
    ] = None
    weighting: Annotated[
        Literal["none", "bsmntw", "sigma_sqrt"], Field(description="Weight of the loss by sigma.")
    ] = "none"


class OptimizerSettings(Settings):
    """The optimizer over the fp32 master weights."""

    name: Annotated[
        Literal["adamw", "adamw8bit", "prodigy"],
        Field(
            description="adamw; adamw8bit (pip install 'wanlora[adamw8bit]', CUDA only); prodigy, "
            "which finds the learning rate itself (pip install 'wanlora[prodigy]')."
        ),
    ] = "adamw"
    beta1: Annotated[float, Field(description="Decay of the first moment.", ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(description="Decay of the second moment.", ge=0, lt=1)] = 0.99
    eps: Annotated[float, Field(description="Added to the denominator.", gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(description="Decoupled weight decay.", ge=0)] = 0.01
    max_grad_norm: Annotated[
        float, Field(description="Clip the global gradient norm once a step; 0 = never.", ge=0)
    ] = 1.0
    schedule: Annotated[
        Literal["constant", "cosine", "linear"], Field(description="Learning rate after warm-up.")
    ] = "constant"
    warmup_steps: Annotated[int, Field(description="Steps of linear warm-up.", ge=0)] = 100


class ValidationSettings(Settings):
    """The loss on fixed clips, noise levels and noise, beside the base model's."""

    every: Annotated[
        int, Field(description="Steps between validations, and one at the end; 0 = never.", ge=0)
    ] = 500
    split: Annotated[str, Field(description="Which split of the view to validate on.")] = "val"
    num_clips: Annotated[
        int, Field(description="Held-out clips, and as many training clips.", ge=1)
    ] = 16
    num_sigmas: Annotated[int, Field(description="Noise levels a clip.", ge=1)] = 8
    train_clips: Annotated[
        bool, Field(description="Validate on training clips too, to see overfitting.")
    ] = True
    patience: Annotated[
        int,
        Field(description="Stop after this many validations without a new best; 0 = never.", ge=0),
    ] = 0


class PreviewSettings(Settings):
    """Latents denoised while training, shown as approximate pictures; no VAE is loaded."""

    every: Annotated[int, Field(description="Steps between previews; 0 = never.", ge=0)] = 0
    num_prompts: Annotated[
        int,
        Field(
            description="Prompts shown: the view's validation prompts, else captions of held-out "
            "clips.",
            ge=1,
        ),
    ] = 2
    steps: Annotated[int, Field(description="Denoising steps.", ge=1)] = 20


class TrainConfig(Settings):
    """Stage two: train a LoRA on cached latents. Loads the transformer and nothing else."""

    cache: CacheDir = Path("cache")
    output_dir: Annotated[Path, Field(description="The run's folder."), Flag()] = Path(
        "outputs/run"
    )
    view: ViewName = "default"
    split: Annotated[str, Field(description="Which split of the view to train on.")] = "train"
    manifest: Annotated[
        tuple[Path, ...], Field(description="Train only on clips named in these manifests."),
        Flag(),
    ] = ()  # fmt: skip
    model: Annotated[
        str | None,
        Field(description="micro, a local diffusers folder or a hub id; None = the view's model."),
        Flag(),
    ] = None
    device: Device = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        Field(description="Type of the base; auto = bfloat16 on a GPU, float32 on a CPU."),
    ] = "auto"
    max_steps: Annotated[
        int | None, Field(description="Optimizer steps; overrides num_epochs.", ge=1),
        Flag(),
    ] = None  # fmt: skip
    num_epochs: Annotated[
        float,
        Field(description="Passes over the clips.", gt=0),
        Flag(),
    ] = 10
    batch_size: Annotated[
        int,
        Field(description="Clips in a micro-batch.", ge=1),
        Flag(),
    ] = 1
    gradient_accumulation_steps: Annotated[
        int,
        Field(
            description="Micro-batches in an optimizer step, over all processes: the global batch "
            "is this times batch_size whatever the number of GPUs.",
            ge=1,
        ),
        Flag(),
    ] = 1
    learning_rate: Annotated[
        float | None,
        Field(description="Peak learning rate; None = 1e-4, or 1 for prodigy.", ge=0),
        Flag(),
    ] = None
    save_steps: Annotated[
        int, Field(description="Steps between checkpoints; 0 = only at the end.", ge=0),
        Flag(),
    ] = 500  # fmt: skip
    keep_checkpoints: Annotated[
        int, Field(description="Newest checkpoints to keep; 0 = all.", ge=0)
    ] = 3
    resume: Annotated[
        bool,
        Field(description="Continue the run in output_dir from its newest checkpoint."),
        Flag(),
    ] = False
    train_frames: Annotated[
        int | None,
        Field(
            description="Train on the first frames of longer clips, 4k+1; None = whole clips. The "
            "VAE is causal, so nothing has to be encoded again.",
            ge=1,
        ),
    ] = None
    local_copy: Annotated[
        Path | None,
        Field(
            description="Folder that rows of a cache at a URL are copied into as they are read, "
            "and read from ever after.",
        ),
        Flag(),
    ] = None
    seed: Seed = 0
    caption_dropout: Annotated[
        float, Field(description="Chance that a clip trains with the empty prompt.", ge=0, le=1)
    ] = 0.0
    gradient_checkpointing: Annotated[
        bool, Field(description="Recompute each block in the backward pass to save memory.")
    ] = True
    allow_untrained_base: Annotated[
        bool, Field(description="Train although the base predicts no better than chance.")
    ] = False
    prefetch_batches: Annotated[
        int, Field(description="Micro-batches read ahead of the step.", ge=1)
    ] = 4
    save_every_epoch: Annotated[
        bool, Field(description="Save a checkpoint at the end of every epoch too.")
    ] = False
    balance_activities: Annotated[
        bool, Field(description="Train every activity equally often, however many clips it has.")
    ] = False
    init_adapter: Annotated[
        Path | None, Field(description="Run folder or adapter file whose weights to start from.")
    ] = None
    ema_decay: Annotated[
        float,
        Field(description="Keep a moving average of the adapter in ema/; 0 = off.", ge=0, lt=1),
    ] = 0.0
    deterministic: Annotated[
        bool,
        Field(description="Bit-exact resume on a GPU too, with slower attention gradients."),
        Flag(),
    ] = False
    trackers: Annotated[
        tuple[Literal["tensorboard", "wandb"], ...],
        Field(description="Where curves go, beside metrics.jsonl and run.html."),
    ] = ("tensorboard",)
    lora: LoraSettings = LoraSettings()
    flow: FlowSettings = FlowSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    validation: ValidationSettings = ValidationSettings()
    previews: PreviewSettings = PreviewSettings()

    @model_validator(mode="after")
    def _frames_fit_the_vae(self) -> Self:
        if self.train_frames is not None and (self.train_frames - 1) % 4:
            below = max(1, self.train_frames - (self.train_frames - 1) % 4)
            raise ValueError(
                f"train_frames {self.train_frames}: expected 4k+1; use {below} or {below + 4}"
            )
        return self


class SampleConfig(Settings):
    """Base model, or base and adapter, and prompts to mp4."""

    adapter: Annotated[
        Path | None,
        Field(description="Run folder or adapter file; without it the base model is sampled."),
        Flag(),
    ] = None
    prompt: Annotated[
        tuple[str, ...], Field(description="What to show; repeat for several."), Flag()
    ] = ()
    latents: Annotated[
        Path | None,
        Field(
            description="Instead of prompts: decode the previews of a run, of one step, or one "
            "file of latents with the VAE."
        ),
        Flag(),
    ] = None
    model: Annotated[
        str | None,
        Field(description="micro, a local diffusers folder or a hub id; None = the adapter's."),
        Flag(),
    ] = None
    num_videos: Annotated[
        int, Field(description="Videos for each prompt, with seeds seed, seed+1, ...", ge=1),
        Flag(),
    ] = 1  # fmt: skip
    output_dir: Annotated[Path, Field(description="Folder for the videos."), Flag()] = Path(
        "outputs/samples"
    )
    output: Annotated[
        Path | None, Field(description="Name of the one video; instead of output_dir."), Flag()
    ] = None
    overwrite: Annotated[bool, Field(description="Replace videos that exist."), Flag()] = False
    seed: Seed = 0
    scale: Annotated[float, Field(description="Strength of the adapter."), Flag()] = 1.0
    num_frames: Annotated[
        int | None, Field(description="Frames, 4k+1; None = the variant's.", ge=1), Flag()
    ] = None
    height: Annotated[int | None, Field(description="px; None = the variant's."), Flag()] = None
    width: Annotated[int | None, Field(description="px; None = the variant's."), Flag()] = None
    steps: Annotated[
        int | None, Field(description="Denoising steps; None = the variant's.", ge=1), Flag()
    ] = None
    guidance_scale: Annotated[
        float | None, Field(description="Classifier-free guidance; None = the variant's.", ge=0),
        Flag(),
    ] = None  # fmt: skip
    negative_prompt: Annotated[
        str | None, Field(description="What to avoid; None = the variant's."), Flag()
    ] = None
    fps: Annotated[float, Field(description="Frames a second of the mp4.", gt=0)] = 16.0
    device: Device = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        Field(description="Type of the transformer; auto = bfloat16 on a GPU, float32 on a CPU."),
    ] = "auto"

    @model_validator(mode="after")
    def _prompts_or_latents(self) -> Self:
        if self.latents is None and not self.prompt:
            raise ValueError("nothing to sample: pass --prompt, or --latents of a run's previews")
        used = {"latents", "model", "output_dir", "overwrite", "fps", "device"}
        if self.latents is not None and (unused := sorted(self.model_fields_set - used)):
            names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
            raise ValueError(f"latents are already denoised, so leave out {names}")
        return self


class DemoConfig(Settings):
    """The whole pipeline on the embedded micro model and drawn videos, minutes on a CPU."""

    output_dir: Annotated[
        Path, Field(description="Folder for everything the demo makes."), Flag()
    ] = Path("outputs/demo")
    max_steps: Annotated[int, Field(description="Training steps.", ge=1), Flag()] = 60
    seed: Seed = 0


COMMANDS: dict[str, type[Settings]] = {
    "demo": DemoConfig,
    "prepare": PrepareConfig,
    "verify": VerifyConfig,
    "cache-latents": CacheLatentsConfig,
    "inspect": InspectConfig,
    "train": TrainConfig,
    "sample": SampleConfig,
}

S = TypeVar("S", bound=Settings)


def load(
    model: type[S],
    *,
    file: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> S:
    """Build a command's settings: default < TOML file < `--set a.b=value` < flag.

    Raises:
        ConfigError: A key is unknown or a value is out of range; names the field and where it came
            from.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values = _read_toml(file)
    for item in sets:
        _assign(values, item)
    values |= {key: value for key, value in (flags or {}).items() if value is not None}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_explain(model, dict(problem)) for problem in error.errors()]
        raise ConfigError("\n".join(problems)) from None


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {file}") from None
    except OSError as error:
        raise ConfigError(f"configuration file {file} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}") from None


def _assign(values: dict[str, Any], item: str) -> None:
    """Apply one `a.b=value`; the value is TOML, or plain text when it is not."""
    name, equals, text = item.partition("=")
    if not equals:
        raise ConfigError(f"--set {item}: expected NAME=VALUE, for example --set lora.rank=16")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, leaf = name.strip().replace("-", "_").split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {item}: {parent} is a value, not a group of settings")
    values[leaf] = value


def _explain(model: type[Settings], problem: dict[str, Any]) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    kind, found = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return _unknown(model, path)
    if kind == "missing":
        return f"--{path.replace('_', '-')} is required: {_description(model, path)}"
    if kind == "string_pattern_mismatch":
        return f"{path}: found {found!r}, which does not fit. {_description(model, path)}"
    if kind in ("model_type", "model_attributes_type"):
        inside = ", ".join(name for name in _names(model) if name.startswith(f"{path}."))
        return f"{path} is a group of settings, not a value (found {found!r}); set one of: {inside}"
    if kind == "tuple_type":
        return f"{path}: expected a list, as in --set '{path}=[\"...\"]' (found {found!r})"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: {message} (found {found!r})" if path else message


def _unknown(model: type[Settings], path: str) -> str:
    """Name the settings there are, the likeliest first."""
    known = sorted(_names(model))
    leaf = path.rpartition(".")[2]
    likely = [name for name in known if name.rpartition(".")[2] == leaf]
    likely += difflib.get_close_matches(path, known, n=1)
    command = next((name for name, config in COMMANDS.items() if config is model), model.__name__)
    guess = f" (did you mean {likely[0]}?)" if likely else ""
    return f"unknown setting {path}{guess}; wanlora {command} has: {', '.join(known)}"


def _description(model: type[Settings], path: str) -> str:
    """What a setting is for, by its dotted name; empty for one inside a list."""
    kind: Any = model
    field = None
    for part in path.split("."):
        field = getattr(kind, "model_fields", {}).get(part)
        kind = field.annotation if field else None
    return str(field.description) if field else ""


def _names(model: type[Settings], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            names += _names(kind, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names
