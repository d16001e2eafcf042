"""What a run trains and validates on: a view narrowed to splits and manifests, over an open store.

Owns: the choice of clips.
"""

import logging
import shlex
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wanlora import manifest
from wanlora.config import TrainConfig
from wanlora.core.batch_sizes import BatchSize, batch_sizes
from wanlora.core.buckets import Bucket
from wanlora.core.groups import describe_few_groups
from wanlora.core.order import balanced_shares, describe_shares, describe_untrained, shares
from wanlora.core.schedule import describe_short_run
from wanlora.errors import NonFiniteError, StoreError
from wanlora.step.batches import BatchSource
from wanlora.step.clips import check_encodings, weighted
from wanlora.step.source import make_source
from wanlora.step.validation import Panel, make_panel
from wanlora.store.reader import StoreReader
from wanlora.store.views import View, ViewClip, read_view
from wanlora.wan import targets
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
    view = _shortened(view or read_view(config.cache, config.view), config.train_frames)
    clips = weighted(_training_clips(view, config), config.clip_weights)
    held_out = tuple(clip for clip in view.clips if clip.split == config.validation.split)
    again = _encode_again(config, config.model or view.model)
    check_encodings(view, variant, encode_again=again)
    needed = replace(view, clips=(*clips, *held_out))
    sizes = batch_sizes(
        sorted({clip.bucket for clip in clips}),
        variant.transformer_shape,
        by=config.batch_by,
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation_steps,
        rank=config.lora.rank,
        adapted=targets.chosen(targets.linear_names(variant.num_layers), config.lora.targets),
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


def preview_prompts(config: TrainConfig, data: Data) -> list[tuple[str, str]]:
    """(label, key) of each preview: validation prompts of the view, else held-out captions."""
    named = [(prompt.prompt, prompt.key) for prompt in data.view.validation_prompts]
    held_out = [clip for clip in data.view.clips if clip.split == config.validation.split]
    captions = [
        (f"the caption of {clip.clip_id}", clip.prompts[0]) for clip in held_out or data.clips
    ]
    return (named or captions)[: config.previews.num_prompts]


def read_fixed_rows(config: TrainConfig, data: Data) -> None:
    """Read every row that validations and previews use, before the first step depends on them.

    Raises:
        StoreError: A row is missing or damaged, or no segment has a projection for previews.
        NonFiniteError: A row holds NaN or infinity.
    """
    for panel in data.panels:
        for clip in panel.clips:
            name = f"{panel.name} clip {clip.clip_id}"
            _require_finite(config, f"the latents of {name}", data.source.latents(clip))
            _require_finite(
                config, f"the caption of {name}", data.source.padded_prompt(clip.prompts[0])
            )
    if config.previews.every:
        data.source.reader.latent_rgb()
        prompts = [
            *preview_prompts(config, data),
            ("the negative prompt", data.view.negative_prompt),
        ]
        for label, key in prompts:
            _require_finite(config, f"preview prompt {label!r}", data.source.padded_prompt(key))


def _require_finite(config: TrainConfig, name: str, tensor: Tensor) -> None:
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


def _shortened(view: View, train_frames: int | None) -> View:
    """Let longer clips count as their first frames.

    The VAE is causal, so a prefix of latents is the latents of the prefix, bit for bit.
    """
    if train_frames is None:
        return view
    clips = tuple(
        replace(
            clip,
            bucket=clip.bucket._replace(num_frames=min(train_frames, clip.bucket.num_frames)),
        )
        for clip in view.clips
    )
    return replace(view, clips=clips)


def _training_clips(view: View, config: TrainConfig) -> tuple[ViewClip, ...]:
    wanted = (
        {clip.clip_id for clip in manifest.read_all(config.manifest)} if config.manifest else None
    )
    known = {clip.clip_id for clip in view.clips}
    if wanted is not None and (absent := sorted(wanted - known)):
        raise StoreError(
            f"{len(absent)} clips of the manifest are not in view {config.view!r} of "
            f"{config.cache}: {', '.join(absent[:3])}{' ...' if len(absent) > 3 else ''}. Run: "
            + _encode_again(config, view.model)
        )
    chosen = tuple(
        clip
        for clip in view.clips
        if clip.split == config.split and (wanted is None or clip.clip_id in wanted)
    )
    if not chosen:
        splits = sorted({clip.split for clip in view.clips})
        raise StoreError(
            f"view {config.view!r} of {config.cache} has no clips of split {config.split!r} to "
            f"train on; it has {len(view.clips)} clips, of splits: {', '.join(splits) or 'none'}"
        )
    return chosen


def _encode_again(config: TrainConfig, model: str) -> str:
    """The command that makes this run's view with the encoders of a model."""
    words = ["wanlora", "cache-latents", "--cache", str(config.cache), "--model", model]
    words += [] if config.view == "default" else ["--view", config.view]
    for path in config.manifest:
        words += ["--manifest", str(path)]
    return shlex.join(words)


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
