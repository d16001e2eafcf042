"""Settings of `wanlora estimate`."""

from typing import Literal, Self

from pydantic import model_validator

from wanlora.config.settings import (
    CacheLocation,
    Settings,
    StreamBlocks,
    ViewName,
    model_setting,
    setting,
)
from wanlora.config.train import (
    KEEP_CHECKPOINTS,
    SAVE_STEPS,
    Accumulation,
    Activations,
    Attention,
    BatchBy,
    BatchSize,
    ClipWeights,
    Eager,
    NumEpochs,
    QuantizeBase,
    refuse_compiled_dora,
)
from wanlora.config.train_sections import LoraSettings, PreviewSettings, ValidationSettings
from wanlora.core.buckets import Bucket, problem_with
from wanlora.wan.variants import Expert

VariantName = Literal[
    "t2v-1.3b", "t2v-14b", "t2v-a14b", "i2v-14b", "i2v-a14b",
    "micro",
]  # fmt: skip
"""Variants of released models, and of the embedded one; not those that only tests have."""


class EstimateConfig(Settings):
    """Estimate the time, memory and disk space of a training run before it starts."""

    cache: CacheLocation | None = setting(
        None,
        "Cache with the clips to train on; without it, the number and size of the clips are those "
        "of --clips, --frames, --height and --width.",
        flag="Input and output",
    )
    view: ViewName = "default"
    clips: int = setting(1000, "Number of clips, without a cache.", ge=1, flag="Clips")
    frames: tuple[int, ...] = setting(
        (81,),
        "Frames per clip, 4k+1, without a cache. Repeat for several lengths, with --clips clips "
        "of each.",
        min_length=1,
        flag="Clips",
    )
    height: int = setting(480, "Clip height in pixels, without a cache.", flag="Clips")
    width: int = setting(832, "Clip width in pixels, without a cache.", flag="Clips")
    variant: VariantName | None = setting(
        None,
        "Variant of the model; nothing is downloaded.",
        flag="Model and machine",
        unset="the model of the cache, or t2v-1.3b",
    )
    expert: Expert | None = setting(
        None,
        "Transformer to train, of a model with two such as t2v-a14b. The estimate is for the run "
        "of one; both take the same time and memory. Required with --probe.",
        flag="Model and machine",
        unset="either",
    )
    device: str = setting(
        "auto",
        "Name of a GPU, for example h100, a100 or 4090; auto: the GPU of this machine, otherwise "
        "an H100. With --probe: auto, cuda, cuda:1, cpu or mps.",
        flag="Model and machine",
    )
    memory_gb: float | None = setting(
        None, "Memory of the GPU in GB.", gt=0, flag="Model and machine", unset="its usual size"
    )
    cards: bool = setting(
        False,
        "Also print what fits GPUs of 16, 24, 32, 48 and 80 GB: T2V-1.3B and T2V-14B, clips of 17, "
        "49 and 81 frames at 480x832 and of 81 at 720x1280, one clip per step.",
        flag="Model and machine",
    )
    probe: bool = setting(
        False,
        "Run three real steps on the device, and scale the estimate by the measured times.",
        flag="Model and machine",
    )
    model: str | None = model_setting(unset="the model of the cache", use="Model for --probe")
    num_epochs: NumEpochs = 10
    batch_size: BatchSize = 1
    gradient_accumulation_steps: Accumulation = 1
    num_processes: int = setting(
        1, "Processes that share the global batch, one per GPU.", ge=1, flag="Model and machine"
    )
    batch_by: BatchBy = "clips"
    save_steps: int = setting(500, SAVE_STEPS, ge=0)
    keep_checkpoints: int = setting(3, KEEP_CHECKPOINTS, ge=0)
    activations: Activations = "auto"
    quantize: QuantizeBase = "none"
    stream_blocks: StreamBlocks = "auto"
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
        if self.probe and self.stream_blocks not in ("auto", 0):
            raise ValueError("--probe measures resident blocks: leave out --stream-blocks")
        if self.lora.dora and not self.probe:
            raise ValueError("lora.dora: the cost of DoRA cannot be predicted; pass --probe")
        refuse_compiled_dora(self.eager, self.lora)
        return self
