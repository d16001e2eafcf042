"""A run that is ready to train: its model, data, folder and processes.

Owns: these values. Must not know: how they are made (`opening`), or the settings (`config`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wanlora.adapters.file import LoraShape
from wanlora.commands.train.data import Data
from wanlora.commands.train.prompts import PreviewPrompt
from wanlora.core.buckets import Bucket
from wanlora.cost.memory import Quantize, Workload
from wanlora.runs.checkpoints import Progress
from wanlora.training.distributed import Ranks
from wanlora.training.kernel_probe import KernelChoice
from wanlora.training.masters import Masters, MovingAverage
from wanlora.training.workload import Trial
from wanlora.wan.variants import TransformerPart, Variant


@dataclass(frozen=True)
class TrainedModel:
    """The transformer with its adapter, and the optimizer of the adapter's master weights.

    Attributes:
        part: The transformer of the variant that is trained.
        num_streamed: Blocks whose frozen weights are in host memory.
        base: Fingerprint of the transformer's weights without the adapter, before quantization.
        quantize: Format of the weights in its blocks.
        average: Moving average of the masters; None without one.
        max_grad_norm: Limit of the global gradient norm; 0 = no limit.
        kernel: Attention kernel of all passes, with its measurements.
    """

    variant: Variant
    part: TransformerPart
    transformer: Any
    num_streamed: int
    base: str
    quantize: Quantize
    shape: LoraShape
    masters: Masters
    average: MovingAverage | None
    optimizer: torch.optim.Optimizer
    optimizer_name: str
    max_grad_norm: float
    kernel: KernelChoice
    device: torch.device
    dtype: torch.dtype

    @property
    def peak_rate(self) -> float:
        """Peak learning rate."""
        return float(self.optimizer.param_groups[0]["initial_lr"])


@dataclass(frozen=True)
class StepPlan:
    """Micro-batches of a step on this process, and how the blocks compute them.

    Attributes:
        slots: This process's slots of each bucket's global batch, one tuple per micro-batch.
        work: The micro-batch that takes the most memory.
        trial: Measurements of that micro-batch, and how the blocks have run since.
        prefetch: Micro-batches that are read ahead.
    """

    slots: Mapping[Bucket, tuple[tuple[int, ...], ...]]
    work: Workload
    trial: Trial
    prefetch: int


@dataclass(frozen=True)
class SavingPlan:
    """When checkpoints are saved, besides the one after the last step.

    Attributes:
        every: Steps between checkpoints; 0 = never.
        every_minutes: Maximum age of the newest checkpoint in minutes; 0 = no limit.
        every_epoch: Save at the end of each epoch too.
        keep: Number of newest checkpoints to keep; 0 = all.
    """

    every: int
    every_minutes: float
    every_epoch: bool
    keep: int


@dataclass(frozen=True)
class ValidationPlan:
    """When the panels of the data are measured, and the results that can be reused.

    Attributes:
        every: Steps between validations; 0 = never.
        patience: Validations without a new best after which the run stops; 0 = never.
        panel_keys: Key of each panel, by its name; see `Panel.key`.
        base_losses: Losses of the base model by panel key, each measured once; grows.
    """

    every: int
    patience: int
    panel_keys: Mapping[str, str]
    base_losses: dict[str, list[list[float]]]


@dataclass(frozen=True)
class PreviewPlan:
    """When previews are made, and of which prompts.

    Attributes:
        every: Steps between previews; 0 = never.
        num_steps: Denoising steps.
    """

    every: int
    num_steps: int
    prompts: tuple[PreviewPrompt, ...]


@dataclass(frozen=True)
class Run:
    """A run's folder, its length, and what happens in it between steps.

    Attributes:
        settings: Content of config.toml.
        facts: Origin of the adapter, for its header.
        identity: Data and base model of the run; a checkpoint of another one is refused.
        checkpoint: The run continues from it; None for a new run.
        progress: State of the run; the loop changes it.
        end_step: Number of steps of the whole run.
        schedule: Name of the learning rate's schedule.
        warmup_steps: Steps of warm-up; a run that continues keeps its own.
        trackers: Names of the programs that also receive the metrics.
    """

    folder: Path
    settings: Mapping[str, Any]
    facts: Mapping[str, str]
    identity: Mapping[str, Any]
    checkpoint: Path | None
    progress: Progress
    end_step: int
    schedule: str
    warmup_steps: int
    trackers: tuple[str, ...]
    saving: SavingPlan
    validation: ValidationPlan
    previews: PreviewPlan


@dataclass(frozen=True)
class Session:
    """A run that is ready to train."""

    model: TrainedModel
    data: Data
    step_plan: StepPlan
    run: Run
    ranks: Ranks

    def micro_batches(self, step: int) -> tuple[tuple[int, ...], ...]:
        """Slots of this process in a step, one tuple per micro-batch."""
        return self.step_plan.slots[self.data.bucket(step)]
