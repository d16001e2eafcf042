"""Check the cached clips of a view for a transformer, and weight them. Needs no torch.

Owns: the comparison of the cached encodings with those that the transformer reads, and the weights
of clips by activity.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from wanlora.core.fingerprint import difference
from wanlora.core.kinds import Kind
from wanlora.core.shares import weight_problem
from wanlora.errors import ConfigError, StaleStoreError
from wanlora.store.views import View, ViewClip
from wanlora.wan.variants import Variant


def check_encodings(view: View, variant: Variant, *, encode_again: str) -> None:
    """Compare the encodings of a view with those that the transformer reads.

    Args:
        view: View of the cached clips.
        variant: Variant of the transformer.
        encode_again: Command that encodes for it.

    Raises:
        StaleStoreError: Names the kinds that the view lacks, or every field that differs.
    """
    if lacking := [kind for kind in variant.kinds if kind not in view.kinds]:
        raise StaleStoreError(
            f"view {view.name!r} was encoded for {view.variant} and lacks {' and '.join(lacking)}, "
            f"which {variant.name} reads; what is encoded already is kept. Add it: {encode_again}"
        )
    wanted: dict[str, dict[str, Any]] = {k: _wanted(k, variant) for k in variant.kinds}
    found: dict[str, dict[str, Any]] = {
        kind: {name: view.provenance(kind).get(name) for name in wanted[kind]}
        for kind in variant.kinds
    }
    if differing := difference(found, wanted):
        raise StaleStoreError(
            f"view {view.name!r} was encoded with {view.model}, which is not what {variant.name} "
            "reads:\n  "
            + "\n  ".join(differing)
            + f"\nencode it for {variant.name}: {encode_again}"
        )


def _wanted(kind: Kind, variant: Variant) -> dict[str, Any]:
    """Fields of the provenance of a kind that a transformer depends on."""
    if kind == "text":
        return {
            "text_dim": variant.shape.text_dim,
            "max_sequence_length": variant.shape.num_text_tokens,
        }
    if kind == "clip_vision":
        return {"image_dim": variant.shape.image_dim}
    return {
        "z_dim": variant.vae.z_dim,
        "latents_mean": list(variant.vae.latents_mean),
        "latents_std": list(variant.vae.latents_std),
        "normalized": True,
    }


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
