"""Clips that a run trains on: a view narrowed to a split, manifests and a number of frames.

Owns: the choice of clips. Must not import torch: clips are chosen before anything is loaded.
"""

import shlex
from dataclasses import replace

from wanlora.config import TrainConfig
from wanlora.data import manifest
from wanlora.errors import StoreError
from wanlora.store.views import View, ViewClip
from wanlora.training.cached_clips import weighted


def choose(config: TrainConfig, view: View) -> tuple[View, tuple[ViewClip, ...]]:
    """Choose the training clips of a view.

    Returns:
        The view with clips of at most `train_frames` frames, and the training clips with their
        weights.

    Raises:
        StoreError: The split has no clips, or the view lacks a clip of a manifest.
        ManifestError: A manifest cannot be read.
        ConfigError: A weight belongs to no activity or is out of range.
    """
    view = _shortened(view, config.train_frames)
    return view, weighted(_training_clips(view, config), config.clip_weights)


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
            + encode_again(config, view.model)
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


def encode_again(config: TrainConfig, model: str) -> str:
    """The command that makes this run's view with the encoders of a model."""
    words = ["wanlora", "cache-latents", "--cache", str(config.cache), "--model", model]
    words += [] if config.view == "default" else ["--view", config.view]
    for path in config.manifest:
        words += ["--manifest", str(path)]
    return shlex.join(words)
