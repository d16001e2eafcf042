"""Lines at the start of a run: clips, steps, what is trained, expected time, where to watch.

Owns: the text. Must not know: how any of it is computed.
"""

import logging
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch

from wanlora.commands.train.data import Data
from wanlora.config import TrainConfig
from wanlora.core import units
from wanlora.core.buckets import Bucket
from wanlora.runs import run_folder
from wanlora.training.masters import Masters

logger = logging.getLogger(__name__)


def log_steps(config: TrainConfig, data: Data, *, end_step: int, num_processes: int) -> None:
    """Log the clips and the planned steps.

    Args:
        config: The run's settings.
        data: Its clips.
        end_step: Number of steps of the whole run.
        num_processes: Processes that share a step.
    """
    held_out = sum(clip.split == config.validation.split for clip in data.view.clips)
    sizes = units.names(sorted({str(clip.bucket) for clip in data.clips}))
    logger.info(
        "%s to train on (%s), %s held out",
        units.count(len(data.clips), "clip"), sizes, f"{held_out:,}" if held_out else "none",
    )  # fmt: skip
    epoch = float(data.source.order.steps_per_epoch)
    batches = sorted({size.global_batch for size in data.sizes.values()})
    logger.info(
        "%s planned, %s of %.4g steps; clips per step: %s (batch size %d, accumulation %d, %s)",
        units.count(end_step, "step"), f"{end_step / epoch:.3g} epochs", epoch,
        " to ".join(str(number) for number in dict.fromkeys((batches[0], batches[-1]))),
        config.batch_size, config.gradient_accumulation_steps,
        units.count(num_processes, "process", "processes"),
    )  # fmt: skip


def log_adapter(
    config: TrainConfig,
    transformer: Any,
    masters: Masters,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Log what is trained and what is in memory.

    Args:
        config: The run's settings.
        transformer: The model, with the adapter in it.
        masters: The adapter's parameters.
        dtype: Type of the transformer.
        device: Its device.
    """
    targets = config.lora.targets
    trainable = masters.flat_gradient.numel()
    frozen = sum(parameter.numel() for parameter in transformer.parameters()) - trainable
    logger.info(
        "training a %s of rank %d on %s: %s parameters in fp32; frozen: the transformer's %s in "
        "%s; on %s, without VAE and text encoder",
        "DoRA" if config.lora.dora else "LoRA", config.lora.rank,
        targets if isinstance(targets, str) else units.names(targets), units.number(trainable),
        units.number(frozen), str(dtype).removeprefix("torch."), device,
    )  # fmt: skip


def log_expectation(
    config: TrainConfig,
    seconds: Mapping[Bucket, float],
    steps: Mapping[Bucket, Fraction],
    *,
    num_steps: int,
    preview_every: int,
) -> None:
    """Log the expected time, where to watch the run, and when its files are written.

    Args:
        config: The run's settings.
        seconds: Seconds of a step, by bucket.
        steps: Steps per epoch, by bucket.
        num_steps: Steps that are left.
        preview_every: Steps between previews; 0 = never.
    """
    mean = sum(seconds[bucket] * float(part) for bucket, part in steps.items())
    mean /= float(sum(steps.values()))
    logger.info(
        "expected time: %s (%s, %s each by the trial), and pauses for validation and previews",
        units.duration(mean * num_steps), units.count(num_steps, "step"), units.duration(mean),
    )  # fmt: skip
    folder = config.output_dir
    board = f", tensorboard --logdir {folder}" if "tensorboard" in config.trackers else ""
    logger.info(
        "watch: %s, wanlora watch %s%s", folder / run_folder.PAGE_NAME, folder.parent, board
    )
    times = [
        *([_every(config.save_steps)] if config.save_steps else []),
        *([f"every {config.save_minutes:g} min"] if config.save_minutes else []),
        "at the end",
    ]
    logger.info(
        "checkpoints: %s, in %s; previews: %s", " and ".join(times),
        folder / run_folder.CHECKPOINTS_NAME,
        _every(preview_every) if preview_every else "none",
    )  # fmt: skip


def _every(num_steps: int) -> str:
    return "every step" if num_steps == 1 else f"every {num_steps:,} steps"
