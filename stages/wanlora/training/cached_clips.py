"""Check the cached clips of a view for a transformer, and weight them. Needs no torch.

Owns: the comparison of the cached encodings with those that the transformer reads, and the weights
of clips by activity.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from wanlora.core.fingerprint import difference
from wanlora.core.shares import weight_problem
from wanlora.errors import ConfigError, StaleStoreError
from wanlora.store.views import View, ViewClip
from wanlora.wan.variants import Variant


def check_encodings(view: View, variant: Variant, *, encode_again: str) -> None:
    """Compare the encodings of latents and embeddings with those that the transformer reads.

    Args:
        view: View of the cached clips.
        variant: Variant of the transformer.
        encode_again: Command that encodes for it.

    Raises:
        StaleStoreError: Names every field that differs.
    """
    wanted: dict[str, dict[str, Any]] = {
        "latents": {
            "z_dim": variant.vae.z_dim,
            "latents_mean": list(variant.vae.latents_mean),
            "latents_std": list(variant.vae.latents_std),
            "normalized": True,
        },
        "text": {
            "text_dim": variant.shape.text_dim,
            "max_sequence_length": variant.shape.num_text_tokens,
        },
    }
    recorded = {str(kind): view.provenance(kind) for kind in view.kinds}
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
    weighted_clips = tuple(
        replace(clip, weight=clip.weight * clip_weights.get(clip.activity, 1.0)) for clip in clips
    )
    for clip in weighted_clips:
        if problem := weight_problem(clip.weight):
            raise ConfigError(
                f"clip_weights.{clip.activity}: clip {clip.clip_id} would have weight "
                f"{clip.weight:g}; {problem}"
            )
    return weighted_clips
