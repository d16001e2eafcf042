"""Settings of `wanlora train`; `wanlora estimate` shares those that decide what a step costs.

Owns: what is trained on, for how long, on which machine, and what is kept.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from wanlora.config.settings import (
    BaseDtype,
    CacheDir,
    Device,
    Settings,
    StreamBlocks,
    ViewName,
    described,
    model_setting,
    seed_setting,
    setting,
)
from wanlora.config.train_sections import (
    FlowSettings,
    LoraSettings,
    OptimizerSettings,
    PreviewSettings,
    ValidationSettings,
)
from wanlora.cost import flops, memory
from wanlora.errors import ConfigError
from wanlora.training import batch_sizes
from wanlora.wan.variants import Expert, Variant

SAVE_STEPS = "Steps between checkpoints; 0 = only at the end."
KEEP_CHECKPOINTS = "Number of newest checkpoints to keep; 0 = all."

NumEpochs = Annotated[float, described("Number of passes over the clips.", gt=0, flag="Training")]
BatchSize = Annotated[
    int,
    described(
        "Clips per micro-batch; with --batch-by cost, clips of the largest bucket.",
        ge=1,
        flag="Training",
    ),
]
Accumulation = Annotated[
    int,
    described(
        "Micro-batches per optimizer step, over all processes: the global batch is this times "
        "batch_size, for any number of GPUs.",
        ge=1,
        flag="Training",
    ),
]
BatchBy = Annotated[
    batch_sizes.BatchBy,
    described(
        "Quantity that is equal in the steps of all buckets. clips: each step has batch_size x "
        "gradient_accumulation_steps clips. cost: a step of the largest bucket has that many "
        "clips; a step of another bucket has the number of clips that costs about the same FLOPs.",
        flag="Training",
    ),
]
Activations = Annotated[
    flops.Activations,
    described(
        "Activations that each block recomputes in the backward pass to save memory. none: nothing "
        "(fastest); selective: everything except attention; full: everything; offload: like full, "
        "with the inputs of blocks in host memory (least memory); auto: none for as many blocks as "
        "fit into memory, selective for the others.",
        flag="Model and machine",
    ),
]
QuantizeBase = Annotated[
    memory.Quantize,
    described(
        "Format of the frozen weights in the blocks. int8 and fp8 take half the memory of "
        "bfloat16 and change the base model slightly; int8 changes it less. The adapter, norms, "
        "embeddings and all products keep their type.",
        flag="Model and machine",
    ),
]
Eager = Annotated[
    Literal["auto", "on", "off"],
    described(
        "Run the blocks without torch.compile; auto: compile only on CUDA. The results are the "
        "same except for rounding. DoRA always runs without torch.compile.",
        flag="Model and machine",
        bare="on",
    ),
]
Attention = Annotated[
    Literal["auto", "cudnn", "flash", "efficient", "math", "fa3", "fa4"],
    described(
        "Attention kernel. auto: the fastest kernel in a short measurement at the size of the "
        "largest bucket, of those whose gradients are right; never math on CUDA. A resumed run "
        "keeps its kernel. fa3 and fa4 need FlashAttention 3 or 4. If you select a kernel, it is "
        "used, or the command fails."
    ),
]
ClipWeights = Annotated[
    dict[str, Annotated[float, Field(gt=0)]],
    described(
        "Sampling weight of all clips of an activity, by its name: clip_weights.walking=2 draws "
        "them twice as often. Multiplied by the weights in the manifest."
    ),
]


class TrainConfig(Settings):
    """Stage two: train a LoRA on cached latents. Loads only the transformer."""

    cache: CacheDir = Path("cache")
    output_dir: Path = setting(Path("outputs/run"), "Folder of the run.", flag="Input and output")
    view: ViewName = "default"
    split: str = setting("train", "Split of the view to train on.")
    manifest: tuple[Path, ...] = setting(
        (), "Train only on the clips in this manifest; repeat for several.", flag="Input and output"
    )
    model: str | None = model_setting(unset="the model of the view")
    expert: Expert | None = setting(
        None,
        "Transformer to train, of a model with two such as Wan2.2-T2V-A14B; required for such a "
        "model. high: transformer/, for sigma 0.875 to 1 (image to video: 0.9 to 1). low: "
        "transformer_2/, for the sigmas below. Train each in a run of its own.",
        flag="Model and machine",
        unset="the only transformer of the model",
    )
    device: Device = "auto"
    dtype: BaseDtype = "auto"
    quantize: QuantizeBase = "none"
    stream_blocks: StreamBlocks = "auto"
    max_steps: int | None = setting(
        None, "Number of optimizer steps; overrides num_epochs.", ge=1, flag="Training"
    )
    num_epochs: NumEpochs = 10
    batch_size: BatchSize = 1
    gradient_accumulation_steps: Accumulation = 1
    batch_by: BatchBy = "clips"
    learning_rate: float | None = setting(
        None,
        "Peak learning rate.",
        gt=0,
        flag="Training",
        names=("--learning-rate", "--lr"),
        unset="1e-4; 1 for prodigy",
    )
    save_steps: int = setting(500, SAVE_STEPS, ge=0, flag="Checkpoints")
    save_minutes: float = setting(
        15,
        "Also save when the last checkpoint is this many minutes old; 0 = never.",
        ge=0,
        flag="Checkpoints",
    )
    keep_checkpoints: int = setting(3, KEEP_CHECKPOINTS, ge=0, flag="Checkpoints")
    resume: bool = setting(
        False,
        "Continue the run in output_dir from its newest checkpoint, with the settings of the run. "
        "Other settings that you pass are applied; those that a run cannot change are rejected.",
        flag="Checkpoints",
    )
    train_frames: int | None = setting(
        None,
        "Train on the first frames of longer clips, 4k+1. The VAE is causal, so nothing has to be "
        "encoded again.",
        ge=1,
        unset="whole clips",
    )
    local_copy: Path | None = setting(
        None,
        "With a cache at a URL: folder for copies of its rows. Each row is downloaded once and "
        "then read from this folder.",
        flag="Model and machine",
    )
    seed: int = seed_setting("Training")
    caption_dropout: float = setting(
        0.0, "Probability that a clip is trained with the empty prompt.", ge=0, le=1
    )
    condition_dropout: float = setting(
        0.0,
        "Probability that a clip is trained without its first frame (image-to-video models only): "
        "mask, condition and embeddings of the image are zeros. Validation always has the frame.",
        ge=0,
        le=1,
    )
    activations: Activations = "auto"
    eager: Eager = "auto"
    attention: Attention = "auto"
    allow_untrained_base: bool = setting(
        False, "Train even if the base predicts no better than chance."
    )
    prefetch_batches: int = setting(4, "Number of micro-batches to read ahead.", ge=1)
    save_every_epoch: bool = setting(
        False, "Also save a checkpoint at the end of each epoch.", flag="Checkpoints"
    )
    balance_activities: bool = setting(
        False, "Draw all activities of a bucket equally often, even if some have more clips."
    )
    clip_weights: ClipWeights = {}  # noqa: RUF012  (pydantic copies it)
    init_adapter: Path | None = setting(
        None, "Initial adapter: run folder, PEFT folder or file in any format.", flag="Adapter"
    )
    ema_decay: float = setting(
        0.0, "Decay of a moving average of the adapter, saved in ema/; 0 = off.", ge=0, lt=1
    )
    deterministic: bool = setting(
        False,
        "Make resumed runs bit-exact on a GPU too; attention gradients are then slower.",
        flag="Model and machine",
    )
    process_timeout_s: float = setting(
        600,
        "Seconds that a process waits for the others; then the run stops and names the process "
        "that does not answer. Must be longer than saving a checkpoint and previews takes.",
        gt=0,
    )
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = setting(
        ("tensorboard",), "Loggers of curves, in addition to metrics.jsonl and run.html."
    )
    lora: LoraSettings = LoraSettings()
    flow: FlowSettings = FlowSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    validation: ValidationSettings = ValidationSettings()
    previews: PreviewSettings = PreviewSettings()

    def check_model(self, variant: Variant) -> None:
        """Refuse settings that a model does not have.

        Raises:
            ConfigError: Names the setting.
        """
        self.previews.check_model(variant, adapter=self.output_dir)
        if self.condition_dropout and not variant.is_i2v:
            raise ConfigError(
                f"condition_dropout {self.condition_dropout:g} is for image-to-video models, and "
                f"{variant.name} has no condition: leave it out"
            )

    @model_validator(mode="after")
    def _frames_fit_the_vae(self) -> Self:
        if self.train_frames is not None and (self.train_frames - 1) % 4:
            below = max(1, self.train_frames - (self.train_frames - 1) % 4)
            raise ValueError(
                f"train_frames {self.train_frames}: expected 4k+1; use {below} or {below + 4}"
            )
        refuse_compiled_dora(self.eager, self.lora)
        refuse_quantized_dora(self.quantize, self.lora)
        if self.balance_activities and self.clip_weights:
            raise ValueError(
                "balance_activities draws all activities of a bucket equally often, and "
                "clip_weights draws some more often: leave out one of them"
            )
        return self


def refuse_compiled_dora(eager: str, lora: LoraSettings) -> None:
    """Refuse `eager off` with DoRA.

    Raises:
        ValueError: Both are set.
    """
    if eager == "off" and lora.dora:
        raise ValueError("eager off: the layers of DoRA cannot be compiled; leave eager at auto")


def refuse_quantized_dora(quantize: memory.Quantize, lora: LoraSettings) -> None:
    """Refuse 8-bit weights with DoRA, whose magnitudes are norms of the base's own weights.

    Raises:
        ValueError: Both are set.
    """
    if quantize != "none" and lora.dora:
        raise ValueError(f"quantize {quantize}: DoRA needs the base's own weights; leave out one")
