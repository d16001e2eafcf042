"""A view over an open store as the source of a step's tensors, for a transformer that reads it.

Owns: the check that what is cached is what the transformer reads, the weights of clips by
activity, and the making of a BatchSource.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from wanlora.core.buckets import Bucket
from wanlora.core.fingerprint import difference
from wanlora.core.order import Order
from wanlora.core.rows import weight_problem
from wanlora.errors import ConfigError, StaleStoreError
from wanlora.step.batches import BatchSource
from wanlora.store.reader import StoreReader
from wanlora.store.views import View, ViewClip
from wanlora.wan.variants import Variant


def check_encodings(view: View, variant: Variant, *, encode_again: str) -> None:
    """Compare what the latents and embeddings were made with to what this transformer reads.

    Args:
        view: What is cached.
        variant: The transformer's.
        encode_again: The command that encodes for it.

    Raises:
        StaleStoreError: Names every field that differs.
    """
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
            f"view {view.name!r} was encoded with {view.model}, which is not what {variant.name} "
            "reads:\n  "
            + "\n  ".join(differing)
            + f"\nencode it for {variant.name}: {encode_again}"
        )


def weighted(
    clips: tuple[ViewClip, ...], clip_weights: Mapping[str, float]
) -> tuple[ViewClip, ...]:
    """Multiply the weights of clips by those of their activities.

    Raises:
        ConfigError: There is no such activity, or a product is out of range.
    """
    activities = {clip.activity for clip in clips}
    if unknown := sorted(clip_weights.keys() - activities):
        raise ConfigError(
            f"clip_weights.{unknown[0]}: no training clip has this activity; there are: "
            f"{', '.join(sorted(activities - {''})) or 'none'}"
        )
    if not clip_weights:
        return clips
    made = tuple(
        replace(clip, weight=clip.weight * clip_weights.get(clip.activity, 1.0)) for clip in clips
    )
    for clip in made:
        if problem := weight_problem(clip.weight):
            raise ConfigError(
                f"clip_weights.{clip.activity}: clip {clip.clip_id} would have weight "
                f"{clip.weight:g}; {problem}"
            )
    return made


def make_source(
    view: View,
    reader: StoreReader,
    clips: Sequence[ViewClip],
    variant: Variant,
    *,
    seed: int,
    sampler: str,
    shift: float | None,
    batch_size: int | Mapping[Bucket, int] = 1,
    weighting: str = "none",
    caption_dropout: float = 0.0,
    balance_activities: bool = False,
) -> BatchSource:
    """Make the source of some clips of a view.

    Args:
        view: Whose clips they are.
        reader: Open on it.
        clips: At least one.
        variant: The transformer's.
        seed: Of every draw.
        sampler: A key of `flow.SAMPLERS`.
        shift: Shift of sigma; None = the view's.
        batch_size: Clips in a global batch, of every bucket or of each.
        weighting: A key of `flow.WEIGHTINGS`.
        caption_dropout: Chance of the empty prompt.
        balance_activities: See `Order`.
    """
    buckets: dict[Bucket, list[ViewClip]] = {}
    for clip in clips:
        buckets.setdefault(clip.bucket, []).append(clip)
    activities = {
        bucket: [clip.activity for clip in members] for bucket, members in buckets.items()
    }
    order = Order(
        {bucket: len(members) for bucket, members in buckets.items()},
        batch_size=batch_size,
        seed=seed,
        activities=activities if balance_activities else None,
        weights={b: [clip.weight for clip in members] for b, members in buckets.items()},
    )
    return BatchSource(
        reader=reader,
        clips=buckets,
        order=order,
        seed=seed,
        sampler=sampler,
        shift=shift or view.shift,
        weighting=weighting,
        caption_dropout=caption_dropout,
        empty_prompt=view.empty_prompt,
        sequence_length=variant.max_sequence_length,
    )
