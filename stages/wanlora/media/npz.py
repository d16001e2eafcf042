"""Clips that are already cut: .npz files of uint8 frames, `(T, H, W, 3)`.

Owns: what such a file must hold. Dimensions: t frames, h height, w width in px.
"""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from wanlora.core import npz
from wanlora.core.buckets import Bucket, problem_with
from wanlora.core.out_of_memory import is_out_of_memory
from wanlora.errors import MediaError, PassingError
from wanlora.media.source import sha256_of


def read_size(path: Path) -> Bucket:
    """Size of the clip in an .npz, from its header alone.

    Raises:
        MediaError: missing; bad_npz for a wrong container, key, type or layout; bad_size for a
            size that Wan's VAE would silently cut.
    """
    try:
        with path.open("rb") as file:
            header = npz.read_header(file)
    except FileNotFoundError:
        raise MediaError("missing", f"{path}: there is no such file") from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise MediaError("bad_npz", f"{path}: {error}") from None
    if problem := npz.layout_problem(header):
        raise MediaError("bad_npz", f"{path}: {problem}")
    bucket = Bucket(*header.shape[:3])
    if problem := problem_with(bucket):
        raise MediaError("bad_size", f"{path}: {problem}")
    return bucket


def read(path: Path) -> UInt8[np.ndarray, "t h w 3"]:
    """Read the frames of a clip: array `frames`, else the only one; pickles are never opened.

    Raises:
        MediaError: As `read_size`, and bad_npz when the data are damaged.
    """
    return _read(path, hashed=False)[0]


def read_hashed(path: Path) -> tuple[UInt8[np.ndarray, "t h w 3"], str]:
    """Read the frames of a clip, and hash the bytes that they are read from.

    Returns:
        The frames, and the hex sha256 of the open file: a file that replaces it does not count.

    Raises:
        MediaError: As `read`.
    """
    return _read(path, hashed=True)


def _read(path: Path, *, hashed: bool) -> tuple[np.ndarray, str]:
    bucket = read_size(path)
    try:
        with path.open("rb") as file:
            digest = sha256_of(file) if hashed else ""
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                frames: np.ndarray = archive[npz.frames_key(archive.files)]
    except Exception as error:  # zlib, zipfile, EOF: a damaged member raises any of them
        if is_out_of_memory(error):
            raise
        raise MediaError("bad_npz", f"{path} is damaged: {error}") from None
    if frames.shape[:3] != tuple(bucket):
        raise PassingError("changed", f"{path} was replaced while it was read; read it again")
    return frames, digest


def read_checked(path: Path) -> Bucket:
    """Read all of a clip to see that it is whole.

    Raises:
        MediaError: As `read`.
    """
    return Bucket(*read(path).shape[:3])
