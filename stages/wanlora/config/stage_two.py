"""The store to an adapter: `estimate` and `train`. Each setting is described once, here."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from wanlora.config.settings import CacheDir, CacheLocation, Device, Flag, Seed, Settings, ViewName
from wanlora.core.buckets import Bucket, problem_with
from wanlora.training import batch_sizes

Activations = Annotated[
    Literal["auto", "none", "selective", "full"],
    Field(
        description="What each block computes again in the backward pass instead of keeping it: "
        "none: nothing, the fastest; selective: all but attention; full: everything, the smallest. "
        "auto: none for as many blocks as fit into memory, selective for the rest."
    ),
    Flag(heading="Model and machine"),
]
Eager = Annotated[
    Literal["auto", "on", "off"],
    Field(
        description="Run blocks without torch.compile; auto = compiled on CUDA, eager elsewhere. "
        "The same numbers but for rounding. DoRA always runs eager."
    ),
    Flag(bare="on", heading="Model and machine"),
]
Attention = Annotated[
    Literal["auto", "cudnn", "flash", "efficient", "math", "fa3", "fa4"],
    Field(
        description="Attention kernel; auto = cudnn before flash from Hopper on, flash before "
        "cudnn on older GPUs, never math on CUDA. fa3 and fa4 need FlashAttention 3 or 4 "
        "installed. A kernel named outright is taken or refused."
    ),
]


NumEpochs = Annotated[
    float, Field(description="Passes over the clips.", gt=0), Flag(heading="Training")
]
BatchSize = Annotated[
    int,
    Field(description="Clips in a micro-batch; by cost, of the largest bucket.", ge=1),
    Flag(heading="Training"),
]
Accumulation = Annotated[
    int,
    Field(
        description="Micro-batches in an optimizer step, over all processes: the global batch "
        "is this times batch_size whatever the number of GPUs.",
        ge=1,
    ),
    Flag(heading="Training"),
]
BatchBy = Annotated[
    batch_sizes.BatchBy,
    Field(
        description="What the steps of buckets of different sizes are equal in. clips: each has "
        "batch_size x gradient_accumulation_steps clips. cost: those of the largest bucket have, "
        "and those of another as many clips as come closest to the same FLOPs."
    ),
    Flag(heading="Training"),
]


ClipWeights = Annotated[
    dict[str, Annotated[float, Field(gt=0)]],
    Field(
        description="Weight of all clips of an activity, by its name: clip_weights.walking=2 draws "
        "them twice as often. Multiplies the weights of the manifest."
    ),
]


class LoraSettings(Settings):
    """The adapter: where it sits and how large it is."""

    rank: Annotated[int, Field(description="Rank r.", ge=1), Flag(heading="Adapter")] = 32
    alpha: Annotated[
        float | None,
        Field(description="The adapter is scaled by alpha/rank. None = rank.", gt=0),
        Flag(heading="Adapter"),
    ] = None
    targets: Annotated[
        str | tuple[str, ...],
        Field(
            description="attention, attention+ffn, all-linear; or a regex (matched against whole "
            "module names), or a list of name suffixes, each of which must match."
        ),
        Flag(heading="Adapter"),
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
        Literal["adamw", "prodigy"],
        Field(
            description="adamw; prodigy, "
            "which finds the learning rate itself and asks the GPU for it every step (pip install "
            "'wanlora[prodigy]')."
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
    warmup_steps: Annotated[
        int | None,
        Field(
            description="Steps of linear warm-up; None = a tenth of the run, at most 100. A run "
            "that continues keeps its own.",
            ge=0,
        ),
    ] = None


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

    prompts: Annotated[
        tuple[str, ...],
        Field(
            description="Prompt of a preview; repeat for several. The cache's text encoder encodes "
            "it before training starts, unless the cache has it."
        ),
        Flag("--preview-prompt", heading="Previews"),
    ] = ()
    every: Annotated[
        int | None,
        Field(
            description="Steps between previews, with one before the first step and one after the "
            "last; 0 = never. None = with --preview-prompt a quarter of the run, at most 500; "
            "else never.",
            ge=0,
        ),
        Flag("--preview-every", heading="Previews"),
    ] = None
    num_prompts: Annotated[
        int,
        Field(
            description="Prompts shown without --preview-prompt: the view's validation prompts, "
            "else captions of held-out clips.",
            ge=1,
        ),
    ] = 2
    steps: Annotated[int, Field(description="Denoising steps.", ge=1)] = 20

    def period(self, end_step: int) -> int:
        """Steps between previews of a run of `end_step` steps; 0 = never."""
        if self.every is not None:
            return self.every
        return min(500, -(-end_step // 4)) if self.prompts else 0


class EstimateConfig(Settings):
    """Before a GPU is used: seconds of a step, hours, memory and disk of a run, counted."""

    cache: Annotated[
        CacheLocation | None,
        Field(description="Cache whose clips to count; without it, as many as --clips says."),
        Flag(heading="Input and output"),
    ] = None
    view: ViewName = "default"
    clips: Annotated[
        int, Field(description="Clips, without a cache.", ge=1), Flag(heading="Clips")
    ] = 1000
    frames: Annotated[
        tuple[int, ...],
        Field(
            description="Frames of a clip, 4k+1, without a cache. Given several times: so many "
            "clips of each.",
            min_length=1,
        ),
        Flag(heading="Clips"),
    ] = (81,)
    height: Annotated[int, Field(description="px, without a cache."), Flag(heading="Clips")] = 480
    width: Annotated[int, Field(description="px, without a cache."), Flag(heading="Clips")] = 832
    variant: Annotated[
        Literal["t2v-1.3b", "t2v-14b", "micro"] | None,
        Field(description="Model; without it that of the cache, else t2v-1.3b."),
        Flag(heading="Model and machine"),
    ] = None
    device: Annotated[
        str,
        Field(
            description="Name of a GPU, for example h100, a100 or 4090; auto: this machine's GPU, "
            "else an H100. With probe: auto, cuda, cuda:1, cpu, mps."
        ),
        Flag(heading="Model and machine"),
    ] = "auto"
    memory_gb: Annotated[
        float | None,
        Field(description="Memory of the GPU in GB; None = as sold.", gt=0),
        Flag(heading="Model and machine"),
    ] = None
    probe: Annotated[
        bool,
        Field(description="Take three real steps on the device, and scale by what they take."),
        Flag(heading="Model and machine"),
    ] = False
    model: Annotated[
        str | None,
        Field(description="With probe: micro, a local folder or a hub id; None = the cache's."),
        Flag(heading="Model and machine"),
    ] = None
    num_epochs: NumEpochs = 10
    batch_size: BatchSize = 1
    gradient_accumulation_steps: Accumulation = 1
    num_processes: Annotated[
        int,
        Field(description="Processes that share the global batch, a GPU each.", ge=1),
        Flag(heading="Model and machine"),
    ] = 1
    batch_by: BatchBy = "clips"
    save_steps: Annotated[
        int, Field(description="Steps between checkpoints; 0 = only at the end.", ge=0)
    ] = 500
    keep_checkpoints: Annotated[
        int, Field(description="Newest checkpoints to keep; 0 = all.", ge=0)
    ] = 3
    activations: Activations = "auto"
    eager: Eager = "auto"
    attention: Attention = "auto"
    clip_weights: ClipWeights = {}  # noqa: RUF012  (pydantic copies it)
    lora: LoraSettings = LoraSettings()
    validation: ValidationSettings = ValidationSettings()
    previews: PreviewSettings = PreviewSettings()

    @model_validator(mode="after")
    def _sizes_fit_wan(self) -> Self:
        for frames in self.frames:
            if problem := problem_with(Bucket(frames, self.height, self.width)):
                raise ValueError(problem)
        if self.gradient_accumulation_steps % self.num_processes:
            raise ValueError(
                f"gradient_accumulation_steps {self.gradient_accumulation_steps}: expected a "
                f"multiple of num_processes, {self.num_processes}"
            )
        if self.clip_weights and self.cache is None:
            raise ValueError("clip_weights are for the activities of a cache: pass --cache")
        if self.model and not self.probe:
            raise ValueError(
                "--model is only for --probe; without --probe, choose the model with --variant"
            )
        if self.lora.dora and not self.probe:
            raise ValueError("lora.dora: what DoRA takes is not counted; measure it with --probe")
        _compiled_dora(self.eager, self.lora)
        return self


def _compiled_dora(eager: str, lora: LoraSettings) -> None:
    if eager == "off" and lora.dora:
        raise ValueError("eager off: the layers of DoRA cannot be compiled; leave eager at auto")


class TrainConfig(Settings):
    """Stage two: train a LoRA on cached latents. Loads the transformer and nothing else."""

    cache: CacheDir = Path("cache")
    output_dir: Annotated[
        Path, Field(description="The run's folder."), Flag(heading="Input and output")
    ] = Path("outputs/run")
    view: ViewName = "default"
    split: Annotated[str, Field(description="Which split of the view to train on.")] = "train"
    manifest: Annotated[
        tuple[Path, ...], Field(description="Train only on clips named in these manifests."),
        Flag(heading="Input and output"),
    ] = ()  # fmt: skip
    model: Annotated[
        str | None,
        Field(description="micro, a local diffusers folder or a hub id; None = the view's model."),
        Flag(heading="Model and machine"),
    ] = None
    device: Device = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        Field(description="Type of the base; auto = bfloat16 on a GPU, float32 on a CPU."),
    ] = "auto"
    max_steps: Annotated[
        int | None, Field(description="Optimizer steps; overrides num_epochs.", ge=1),
        Flag(heading="Training"),
    ] = None  # fmt: skip
    num_epochs: NumEpochs = 10
    batch_size: BatchSize = 1
    gradient_accumulation_steps: Accumulation = 1
    batch_by: BatchBy = "clips"
    learning_rate: Annotated[
        float | None,
        Field(description="Peak learning rate; None = 1e-4, or 1 for prodigy.", gt=0),
        Flag("--learning-rate", "--lr", heading="Training"),
    ] = None
    save_steps: Annotated[
        int, Field(description="Steps between checkpoints; 0 = only at the end.", ge=0),
        Flag(heading="Checkpoints"),
    ] = 500  # fmt: skip
    save_minutes: Annotated[
        float,
        Field(
            description="Save also when the last checkpoint is this many minutes old; 0 = never.",
            ge=0,
        ),
        Flag(heading="Checkpoints"),
    ] = 15
    keep_checkpoints: Annotated[
        int,
        Field(description="Newest checkpoints to keep; 0 = all.", ge=0),
        Flag(heading="Checkpoints"),
    ] = 3
    resume: Annotated[
        bool,
        Field(
            description="Continue the run in output_dir from its newest checkpoint, with the run's "
            "own settings; settings given as well are applied, or refused if they would make it "
            "another run."
        ),
        Flag(heading="Checkpoints"),
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
            description="Folder for copies of the rows of a cache at a URL: each row is fetched "
            "once and then read from this folder.",
        ),
        Flag(heading="Model and machine"),
    ] = None
    seed: Annotated[Seed, Flag(heading="Training")] = 0
    caption_dropout: Annotated[
        float, Field(description="Chance that a clip trains with the empty prompt.", ge=0, le=1)
    ] = 0.0
    activations: Activations = "auto"
    eager: Eager = "auto"
    attention: Attention = "auto"
    allow_untrained_base: Annotated[
        bool, Field(description="Train although the base predicts no better than chance.")
    ] = False
    prefetch_batches: Annotated[
        int, Field(description="Micro-batches read ahead of the step.", ge=1)
    ] = 4
    save_every_epoch: Annotated[
        bool,
        Field(description="Save a checkpoint at the end of every epoch too."),
        Flag(heading="Checkpoints"),
    ] = False
    balance_activities: Annotated[
        bool,
        Field(
            description="Train all activities of a bucket equally often, however many clips each "
            "has."
        ),
    ] = False
    clip_weights: ClipWeights = {}  # noqa: RUF012  (pydantic copies it)
    init_adapter: Annotated[
        Path | None,
        Field(description="Run folder, PEFT folder or adapter file, in any format, to start from."),
        Flag(heading="Adapter"),
    ] = None
    ema_decay: Annotated[
        float,
        Field(description="Keep a moving average of the adapter in ema/; 0 = off.", ge=0, lt=1),
    ] = 0.0
    deterministic: Annotated[
        bool,
        Field(description="Bit-exact resume on a GPU too, with slower attention gradients."),
        Flag(heading="Model and machine"),
    ] = False
    process_timeout_s: Annotated[
        float,
        Field(
            description="Seconds that a process waits for the others before the run stops and "
            "names the one that does not answer; longer than a checkpoint and its previews take.",
            gt=0,
        ),
    ] = 600
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
        _compiled_dora(self.eager, self.lora)
        if self.balance_activities and self.clip_weights:
            raise ValueError(
                "balance_activities draws all activities of a bucket equally often, and "
                "clip_weights draws some more often: leave out one of them"
            )
        return self
