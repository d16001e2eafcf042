"""Data of a run: the chosen clips over an open store, and the panels to validate on.

Owns: what is read from the store before the first step. The clips are chosen in `clips`.
"""

import logging
import shlex
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wanlora.adapters import targets
from wanlora.commands.train.selection import choose, encode_again
from wanlora.config import TrainConfig
from wanlora.core.buckets import Bucket
from wanlora.core.intervals import describe_few_groups
from wanlora.core.shares import balanced_shares, describe_shares, shares
from wanlora.errors import NonFiniteError
from wanlora.store.reader import StoreReader
from wanlora.store.views import View, ViewClip, read_view
from wanlora.training.batch_sizes import BatchSize, batch_sizes
from wanlora.training.batches import BatchSource
from wanlora.training.cached_clips import check_encodings
from wanlora.training.order import describe_untrained
from wanlora.training.schedule import describe_short_run
from wanlora.training.source import make_source
from wanlora.training.validation import Panel, make_panel
from wanlora.wan.variants import Variant

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """Clips to train on, panels to validate on, and where their tensors come from.

    Attributes:
        sizes: Clips of each bucket in a step.
    """

    view: View
    clips: tuple[ViewClip, ...]
    sizes: dict[Bucket, BatchSize]
    source: BatchSource
    panels: tuple[Panel, ...]

    @property
    def held_out(self) -> Panel | None:
        """Panel of the held-out clips; None without one."""
        return next((panel for panel in self.panels if panel.name == "val"), None)

    def identity(self, variant: Variant, base: str) -> dict[str, Any]:
        """Everything that a checkpoint must have been trained on to be continued.

        Args:
            variant: The transformer's.
            base: Fingerprint of its weights.
        """
        return {
            "base": base,
            "view_sha256": self.view.sha256,
            "latents": self.view.latents,
            "text": self.view.text,
            "variant": variant.name,
        }


def open_data(config: TrainConfig, variant: Variant, view: View | None = None) -> Data:
    """Read the view, choose clips, and check that the store has them in this transformer's terms.

    Raises:
        StoreError: There is no such view or split, clips are missing, or encodings do not fit.
        ConfigError: A weight belongs to no activity or is out of range.
        ManifestError: A manifest given to choose clips cannot be read.
    """
    view, clips = choose(config, view or read_view(config.cache, config.view))
    held_out = tuple(clip for clip in view.clips if clip.split == config.validation.split)
    check_encodings(view, variant, encode_again=encode_again(config, config.model or view.model))
    needed = replace(view, clips=(*clips, *held_out))
    sizes = batch_sizes(
        sorted({clip.bucket for clip in clips}),
        variant.transformer_shape,
        by=config.batch_by,
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation_steps,
        rank=config.lora.rank,
        adapted=targets.match_targets(
            targets.linear_names(variant.num_layers), config.lora.targets
        ),
    )
    reader = StoreReader.of_view(config.cache, needed, local_copy=config.local_copy)
    source = make_source(
        view,
        reader,
        clips,
        variant,
        seed=config.seed,
        sampler=config.flow.sampler,
        shift=config.flow.shift,
        batch_size={bucket: size.global_batch for bucket, size in sizes.items()},
        weighting=config.flow.weighting,
        caption_dropout=config.caption_dropout,
        balance_activities=config.balance_activities,
    )
    return Data(view, clips, sizes, source, _panels(config, source, clips, held_out))


def read_fixed_rows(config: TrainConfig, data: Data) -> None:
    """Read every row that validations use, before the first step depends on them.

    Raises:
        StoreError: A row is missing or damaged.
        NonFiniteError: A row holds NaN or infinity.
    """
    for panel in data.panels:
        for clip in panel.clips:
            name = f"{panel.name} clip {clip.clip_id}"
            require_finite(config, f"the latents of {name}", data.source.latents(clip))
            require_finite(
                config, f"the caption of {name}", data.source.padded_prompt(clip.prompts[0])
            )


def require_finite(config: TrainConfig, name: str, tensor: Tensor) -> None:
    """Refuse a row that holds NaN or infinity.

    Args:
        config: Its cache is named in the message.
        name: Name of the row.
        tensor: The row.

    Raises:
        NonFiniteError: Names the row.
    """
    if not torch.isfinite(tensor).all():
        raise NonFiniteError(
            f"{name}: the cached values are NaN or infinite. Run: wanlora inspect "
            f"{shlex.quote(str(config.cache))} --verify"
        )


def log_draws(config: TrainConfig, data: Data, *, end_step: int) -> None:
    """Log the expected share of draws of each activity, and warn of buckets without a step."""
    found = (
        balanced_shares((clip.bucket, clip.activity, clip.weight) for clip in data.clips)
        if config.balance_activities
        else shares((clip.activity, clip.weight) for clip in data.clips)
    )
    if len(found) > 1:
        logger.info("expected share of draws: %s", describe_shares(found))
    number = Counter(clip.bucket for clip in data.clips)
    batch = {bucket: size.global_batch for bucket, size in data.sizes.items()}
    for problem in describe_untrained(data.source.order, number, batch, end_step=end_step):
        logger.warning("%s", problem)


def warn_of_little(config: TrainConfig, data: Data, *, end_step: int, num_processes: int) -> None:
    """Warn of a run too short to learn from, and of held-out clips too few to measure it."""
    order = data.source.order
    short = describe_short_run(
        end_step,
        steps_per_epoch=order.steps_per_epoch,
        draws_per_epoch=order.draws_per_epoch,
        num_epochs=None if config.max_steps else config.num_epochs,
        accumulation=config.gradient_accumulation_steps,
        num_processes=num_processes,
    )
    if short:
        logger.warning("%s", short)
    if config.validation.every:
        split = config.validation.split
        held_out = {clip.source_group for clip in data.view.clips if clip.split == split}
        every = held_out | {clip.source_group for clip in data.clips}
        if few := describe_few_groups(len(held_out), len(every)):
            logger.warning("split %r: %s", split, few)


def _panels(
    config: TrainConfig,
    source: BatchSource,
    clips: tuple[ViewClip, ...],
    held_out: tuple[ViewClip, ...],
) -> tuple[Panel, ...]:
    settings = config.validation
    if not settings.every:
        return ()
    choices = [("val", held_out)] + ([("train", clips)] if settings.train_clips else [])
    panels = [
        make_panel(
            name, members, source, num_clips=settings.num_clips, num_sigmas=settings.num_sigmas
        )
        for name, members in choices
    ]
    return tuple(panel for panel in panels if panel)
