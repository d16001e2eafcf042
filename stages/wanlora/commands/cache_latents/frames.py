"""Decode a clip to frames, or return the reason why not; imports little, for one process per core.

Owns: the frames as a tensor, and as an array for Ray. Must not know: encoders, the store.
Legend: t frames, h w height and width.
"""

import socket

import numpy as np
import torch
from jaxtyping import UInt8

from wanlora.data.clip import Clip
from wanlora.data.clip_frames import load_unchanged
from wanlora.errors import MediaError
from wanlora.media.source import SourceHashes

_hashed_here: SourceHashes = {}
"""Hashes that this process computed, of sources whose mtime differs on this machine."""


def decode(
    clip: Clip, num_frames: int | None, *, known: SourceHashes
) -> UInt8[torch.Tensor, "t 3 h w"] | MediaError:
    """Load a clip's frames, or return the reason why they cannot be loaded.

    Args:
        clip: With the hash of its source that its key was made from.
        num_frames: Load only this many frames from the start; None loads all.
        known: Hashes of sources by path, size and mtime.
    """
    try:
        return load_unchanged(clip, known, num_frames=num_frames)
    except MediaError as error:
        return error


def decode_remotely(
    clip: Clip, num_frames: int | None, entry: tuple[int, int, str] | None
) -> UInt8[np.ndarray, "t 3 h w"] | MediaError:
    """Load a clip's frames on another machine, which may lack a source that the first one has.

    Args:
        clip: As for `decode`.
        num_frames: As for `decode`.
        entry: Size, mtime and hash of its source on the first machine.
    """
    if entry is not None:
        _hashed_here.setdefault(str(clip.path), entry)
    frames = decode(clip, num_frames, known=_hashed_here)
    if isinstance(frames, torch.Tensor):
        return frames.numpy()
    if frames.code != "missing":
        return frames
    return MediaError(
        "missing",
        f"{frames} (on {socket.gethostname()}; every machine of the cluster must have the videos "
        "under the same paths)",
    )
