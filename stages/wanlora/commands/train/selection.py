"""The clips that a run trains on: a view narrowed to a split, manifests and a number of frames.

Owns: the selection of clips. Must not import torch: clips are selected before anything is loaded.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from wanlora.core import units
from wanlora.core.location import Location
from wanlora.data import manifest
from wanlora.errors import StoreError
from wanlora.store.views import View, ViewClip
from wanlora.training.cached_clips import weighted


class Selection(NamedTuple):
    """The clips to train on.

    Attributes:
        view: The whole view, with clips of at most `train_frames` frames.
        clips: Its training clips, with their weights.
    """

    view: View
    clips: tuple[ViewClip, ...]


def select_clips(
    view: View,
    *,
    cache: Location,
    split: str,
    manifests: Sequence[Path],
    train_frames: int | None,
    clip_weights: Mapping[str, float],
) -> Selection:
    """Select the training clips of a view.

    Args:
        view: The view.
        cache: Its cache; named in messages.
        split: Split to train on.
        manifests: Train only on clips of these manifests; empty = on all clips.
        train_frames: Maximum number of frames per clip; None = no limit.
        clip_weights: Weights by activity.

    Raises:
        StoreError: The split has no clips, or the view lacks a clip of a manifest.
        ManifestError: A manifest cannot be read.
        ConfigError: A weight is for an unknown activity or out of range.
    """
    view = _shortened(view, train_frames)
    clips = _training_clips(view, cache, split, manifests)
    return Selection(view, weighted(clips, clip_weights))


def _shortened(view: View, train_frames: int | None) -> View:
    """Reduce longer clips to their first frames.

    The VAE is causal: the first latent frames of a clip are the latents of its first frames, bit
    for bit.
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


def _training_clips(
    view: View, cache: Location, split: str, manifests: Sequence[Path]
) -> tuple[ViewClip, ...]:
    wanted = {clip.clip_id for clip in manifest.read_all(manifests)} if manifests else None
    if wanted is not None and (absent := sorted(wanted - {clip.clip_id for clip in view.clips})):
        raise StoreError(
            f"{len(absent)} clips of the manifest are not in view {view.name!r} of {cache}: "
            f"{units.names(absent)}. Run: "
            + encode_command(view.model, cache=cache, view=view.name, manifests=manifests)
        )
    clips = tuple(
        clip
        for clip in view.clips
        if clip.split == split and (wanted is None or clip.clip_id in wanted)
    )
    if not clips:
        splits = sorted({clip.split for clip in view.clips})
        raise StoreError(
            f"view {view.name!r} of {cache} has no clips of split {split!r} to train on; it has "
            f"{len(view.clips)} clips, of splits: {', '.join(splits) or 'none'}"
        )
    return clips


def encode_command(model: str, *, cache: Location, view: str, manifests: Sequence[Path]) -> str:
    """Build the command that makes a view with the encoders of a model."""
    words = ["wanlora", "cache-latents", "--cache", str(cache), "--model", model]
    words += [] if view == "default" else ["--view", view]
    for path in manifests:
        words += ["--manifest", str(path)]
    return shlex.join(words)
