"""What a run trains and validates on: a view narrowed to splits and manifests, over an open store.

Owns: the choice of clips, and the check that they were encoded for this transformer.
"""

import logging
import shlex
from dataclasses import dataclass, replace
from typing import Any

from wanlora import manifest
from wanlora.config import TrainConfig
from wanlora.core.buckets import Bucket
from wanlora.core.fingerprint import difference
from wanlora.core.order import Order
from wanlora.errors import StaleStoreError, StoreError
from wanlora.step.batches import BatchSource
from wanlora.step.validation import Panel, make_panel
from wanlora.store.reader import StoreReader
from wanlora.store.views import View, ViewClip, read_view
from wanlora.wan.variants import Variant

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """Clips to train on, panels to validate on, and where their tensors come from."""

    view: View
    clips: tuple[ViewClip, ...]
    source: BatchSource
    panels: tuple[Panel, ...]

    def identity(self, variant: Variant) -> dict[str, Any]:
        """What a checkpoint is compared with before it is continued."""
        return {
            "view_sha256": self.view.sha256,
            "latents": self.view.latents,
            "text": self.view.text,
            "variant": variant.name,
        }


def open_data(config: TrainConfig, variant: Variant) -> Data:
    """Read the view, choose clips, and check that the store has them in this transformer's terms.

    Raises:
        StoreError: There is no such view or split, clips are missing, or encodings do not fit.
        ManifestError: A manifest given to choose clips cannot be read.
    """
    view = _shortened(read_view(config.cache, config.view), config.train_frames)
    clips = _training_clips(view, config)
    held_out = tuple(clip for clip in view.clips if clip.split == config.validation.split)
    _check_encodings(view, variant, config)
    needed = replace(view, clips=(*clips, *held_out))
    reader = StoreReader.of_view(config.cache, needed, local_copy=config.local_copy)
    source = _source(config, view, variant, reader, clips)
    return Data(view, clips, source, _panels(config, source, clips, held_out))


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


def _check_encodings(view: View, variant: Variant, config: TrainConfig) -> None:
    """Compare what the latents and embeddings were made with to what this transformer reads."""
    wanted: dict[str, dict[str, Any]] = {
        "latents": {
            "z_dim": variant.z_dim,
            "latents_mean": list(variant.latents_mean),
            "latents_std": list(variant.latents_std),
            "normalized": True,
        },
        "text": {
            "text_dim": variant.text_dim,
            "max_sequence_length": variant.max_sequence_length,
        },
    }
    recorded = {"latents": view.latents_provenance, "text": view.text_provenance}
    found = {
        kind: {name: recorded[kind].get(name) for name in fields} for kind, fields in wanted.items()
    }
    if differing := difference(found, wanted):
        raise StaleStoreError(
            f"view {config.view!r} of {config.cache} was encoded with {view.model}, which is not "
            f"what {variant.name} reads:\n  "
            + "\n  ".join(differing)
            + f"\nencode it for {variant.name}: {_encode_again(config, config.model or view.model)}"
        )


def _encode_again(config: TrainConfig, model: str) -> str:
    """The command that makes this run's view with the encoders of a model."""
    words = ["wanlora", "cache-latents", "--cache", str(config.cache), "--model", model]
    words += [] if config.view == "default" else ["--view", config.view]
    for path in config.manifest:
        words += ["--manifest", str(path)]
    return shlex.join(words)


def _source(
    config: TrainConfig,
    view: View,
    variant: Variant,
    reader: StoreReader,
    clips: tuple[ViewClip, ...],
) -> BatchSource:
    buckets: dict[Bucket, list[ViewClip]] = {}
    for clip in clips:
        buckets.setdefault(clip.bucket, []).append(clip)
    order = Order(
        {bucket: len(members) for bucket, members in buckets.items()},
        batch_size=config.batch_size * config.gradient_accumulation_steps,
        seed=config.seed,
        activities={
            bucket: [clip.activity for clip in members] for bucket, members in buckets.items()
        }
        if config.balance_activities
        else None,
    )
    return BatchSource(
        reader=reader,
        clips=buckets,
        order=order,
        seed=config.seed,
        sampler=config.flow.sampler,
        shift=config.flow.shift or view.shift,
        weighting=config.flow.weighting,
        caption_dropout=config.caption_dropout,
        empty_prompt=view.empty_prompt,
        sequence_length=variant.max_sequence_length,
    )


def _panels(
    config: TrainConfig,
    source: BatchSource,
    clips: tuple[ViewClip, ...],
    held_out: tuple[ViewClip, ...],
) -> tuple[Panel, ...]:
    settings = config.validation
    if not settings.every:
        return ()
    if not held_out:
        logger.warning(
            "the view has no clips of split %r: no held-out loss, no best checkpoint "
            "(wanlora prepare --val-fraction 0.05 makes some)", settings.split,
        )  # fmt: skip
    choices = [("val", held_out)] + ([("train", clips)] if settings.train_clips else [])
    panels = [
        make_panel(
            name, members, source, num_clips=settings.num_clips, num_sigmas=settings.num_sigmas
        )
        for name, members in choices
    ]
    return tuple(panel for panel in panels if panel)
