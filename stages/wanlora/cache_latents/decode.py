"""A clip to frames, where a failure is a result like another; light enough for a process a core.

Owns: the two forms that frames travel in. Must not know: encoders, the store.
Legend: t frames, h w height and width.
"""

import socket

import numpy as np
import torch
from jaxtyping import UInt8

from wanlora.clips import load_clip
from wanlora.errors import MediaError
from wanlora.manifest import Clip


def decode(clip: Clip) -> UInt8[torch.Tensor, "t 3 h w"] | MediaError:
    """Load a clip's frames, or what is wrong with its source."""
    try:
        return load_clip(clip)
    except MediaError as error:
        return error


def decode_remotely(clip: Clip) -> UInt8[np.ndarray, "t 3 h w"] | MediaError:
    """Load a clip's frames on another machine, which may lack a source that the first one has."""
    frames = decode(clip)
    if isinstance(frames, torch.Tensor):
        return frames.numpy()
    if frames.code != "missing":
        return frames
    return MediaError(
        "missing",
        f"{frames} (on {socket.gethostname()}; every machine of the cluster must have the videos "
        "under the same paths)",
    )
