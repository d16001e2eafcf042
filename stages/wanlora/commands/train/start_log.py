"""Log lines at the start of a run: clips, steps, trained modules, expected time, watch command.

Owns: the text, and the warnings about a run that will not learn. Must not know: settings.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from wanlora.adapters.file import LoraShape
from wanlora.commands.train.base_model import Base
from wanlora.commands.train.data import Data
from wanlora.commands.train.session import Session
from wanlora.core import units
from wanlora.core.buckets import Bucket
from wanlora.core.intervals import describe_few_groups
from wanlora.core.shares import balanced_shares, describe_shares, shares
from wanlora.cost.memory import Quantize, Workload
from wanlora.cost.seconds import model_flops
from wanlora.runs import run_folder
from wanlora.training.batches import BatchSource
from wanlora.training.flow import share_of
from wanlora.training.masters import Masters
from wanlora.training.order import Order, describe_untrained
from wanlora.training.pace import expected_seconds
from wanlora.training.schedule import describe_short_run
from wanlora.wan.variants import Variant, describe_range

logger = logging.getLogger(__name__)


def log_steps(
    data: Data, *, end_step: int, batch_size: int, accumulation: int, num_processes: int
) -> None:
    """Log the clips and the planned steps.

    Args:
        data: Clips of the run.
        end_step: Number of steps of the whole run.
        batch_size: Clips per micro-batch.
        accumulation: Micro-batches per step.
        num_processes: Processes that share a step.
    """
    sizes = units.names(sorted({str(clip.bucket) for clip in data.clips}))
    logger.info(
        "%s to train on (%s), %s held out",
        units.count(len(data.clips), "clip"), sizes,
        f"{len(data.held_out):,}" if data.held_out else "none",
    )  # fmt: skip
    epoch = float(data.source.order.steps_per_epoch)
    batches = sorted({size.global_batch for size in data.sizes.values()})
    logger.info(
        "%s planned, %s of %.4g steps; clips per step: %s (batch size %d, accumulation %d, %s)",
        units.count(end_step, "step"), f"{end_step / epoch:.3g} epochs", epoch,
        " to ".join(str(number) for number in dict.fromkeys((batches[0], batches[-1]))),
        batch_size, accumulation, units.count(num_processes, "process", "processes"),
    )  # fmt: skip


def log_sigmas(source: BatchSource, base: Base, *, origin: str) -> None:
    """Log the distribution of sigma; of an expert also its range and its share of all draws.

    Args:
        source: Source of the steps.
        base: The model and the transformer that is trained.
        origin: Origin of the shift, in words.
    """
    name, part = base.variant.name, base.part
    logger.info(
        "sigma: %s, shift %g (%s)", source.sampler, source.shift, origin,
    )  # fmt: skip
    if part.expert:
        share = share_of(part.sigmas, sampler=source.sampler, shift=source.shift)
        logger.info(
            "training the %s-noise expert of %s (%s/) on %s: %.1f %% of the draws of that "
            "distribution, with its shape", part.expert, name, part.subfolder,
            describe_range(part.sigmas), 100 * share,
        )  # fmt: skip


def log_draws(data: Data, *, balance_activities: bool, end_step: int) -> None:
    """Log the expected share of draws of each activity, and warn of buckets without a step.

    Args:
        data: Clips of the run.
        balance_activities: True if all activities of a bucket are drawn equally often.
        end_step: Number of steps of the whole run.
    """
    expected = (
        balanced_shares((clip.bucket, clip.activity, clip.weight) for clip in data.clips)
        if balance_activities
        else shares((clip.activity, clip.weight) for clip in data.clips)
    )
    if len(expected) > 1:
        logger.info("expected share of draws: %s", describe_shares(expected))
    number = Counter(clip.bucket for clip in data.clips)
    batch = {bucket: size.global_batch for bucket, size in data.sizes.items()}
    for problem in describe_untrained(data.source.order, number, batch, end_step=end_step):
        logger.warning("%s", problem)


def warn_of_images(data: Data, variant: Variant) -> None:
    """Warn of clips of one frame for an image-to-video model: they are their own condition."""
    number = sum(clip.bucket.num_frames == 1 for clip in data.clips)
    if variant.is_i2v and number:
        logger.warning(
            "%s of one frame to train on: %s gets the first frame as its condition, so it learns "
            "nothing from them", units.count(number, "clip"), variant.name,
        )  # fmt: skip


def warn_of_short_run(
    order: Order,
    *,
    end_step: int,
    num_epochs: float | None,
    accumulation: int,
    num_processes: int,
) -> None:
    """Warn of a run that is too short to learn from.

    Args:
        order: Order of the clips.
        end_step: Number of steps of the whole run.
        num_epochs: Its epochs; None if the number of steps was given.
        accumulation: Micro-batches per step.
        num_processes: Processes that share a step.
    """
    problem = describe_short_run(
        end_step,
        steps_per_epoch=order.steps_per_epoch,
        draws_per_epoch=order.draws_per_epoch,
        num_epochs=num_epochs,
        accumulation=accumulation,
        num_processes=num_processes,
    )
    if problem:
        logger.warning("%s", problem)


def warn_of_few_groups(data: Data, *, split: str) -> None:
    """Warn of held-out clips from too few source groups for a reliable measurement.

    Args:
        data: Clips of the run.
        split: Name of the validation split.
    """
    held_out = {clip.source_group for clip in data.held_out}
    every = held_out | {clip.source_group for clip in data.clips}
    if problem := describe_few_groups(len(held_out), len(every)):
        logger.warning("split %r: %s", split, problem)


def log_adapter(
    shape: LoraShape,
    transformer: Any,
    masters: Masters,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Quantize,
) -> None:
    """Log what is trained and what is in memory.

    Args:
        shape: Shape of the adapter.
        transformer: The model with the adapter in it.
        masters: The adapter's parameters.
        dtype: Type of the transformer.
        device: Its device.
        quantize: Format of the weights in its blocks.
    """
    targets = shape.targets
    trainable = masters.flat_gradient.numel()
    frozen = sum(parameter.numel() for parameter in transformer.parameters()) - trainable
    logger.info(
        "training a %s of rank %d on %s: %s parameters in fp32; frozen: the transformer's %s in "
        "%s; on %s, without VAE and text encoder",
        "DoRA" if shape.dora else "LoRA", shape.rank,
        targets if isinstance(targets, str) else units.names(targets), units.number(trainable),
        units.number(frozen),
        str(dtype).removeprefix("torch.")
        + (f", those of the blocks in {quantize}" if quantize != "none" else ""),
        device,
    )  # fmt: skip


def log_batches(data: Data, works: Mapping[Bucket, Workload]) -> None:
    """Log the clips and FLOPs of a step of each bucket, if there are several.

    Args:
        data: Clips of the run.
        works: Micro-batch of each bucket.
    """
    if len(data.sizes) > 1:
        number = Counter(clip.bucket for clip in data.clips)
        logger.info(
            "a step has clips of one bucket:\n%s",
            "\n".join(
                f"  {bucket}: {size.global_batch} of {number[bucket]:,}, {size.micro_batch} at "
                f"once, {size.num_micro_batches * model_flops(works[bucket]) / 1e12:.4g} TFLOP"
                for bucket, size in data.sizes.items()
            ),
        )


def log_expectation(session: Session) -> None:
    """Log the expected time, the command that watches the run, and when its files are written."""
    run, plan = session.run, session.step_plan
    seconds = expected_seconds(plan.work, plan.trial, plan.slots)
    steps = session.data.source.order.bucket_steps_per_epoch
    num_steps = run.end_step - run.progress.step
    mean = sum(seconds[bucket] * float(part) for bucket, part in steps.items())
    mean /= float(sum(steps.values()))
    logger.info(
        "expected time: %s (%s, %s each by the trial), and pauses for validation and previews",
        units.duration(mean * num_steps), units.count(num_steps, "step"), units.duration(mean),
    )  # fmt: skip
    board = f", tensorboard --logdir {run.folder}" if "tensorboard" in run.trackers else ""
    logger.info(
        "watch: %s, wanlora watch %s%s",
        run.folder / run_folder.PAGE_NAME, run.folder.parent, board,
    )  # fmt: skip
    saving, expert = run.saving, session.model.part.expert
    times = [
        *([_every(saving.every)] if saving.every else []),
        *([f"every {saving.every_minutes:g} min"] if saving.every_minutes else []),
        "at the end",
    ]
    logger.info(
        "checkpoints: %s, in %s; previews: %s", " and ".join(times),
        run.folder / run_folder.CHECKPOINTS_NAME,
        _every(run.previews.every) if run.previews.every else _NO_PREVIEWS[bool(expert)],
    )  # fmt: skip


_NO_PREVIEWS = {
    False: "none",
    True: "none, because a video needs both experts: use wanlora sample",
}
"""Reason by whether the model has two transformers."""


def _every(num_steps: int) -> str:
    return "every step" if num_steps == 1 else f"every {num_steps:,} steps"
