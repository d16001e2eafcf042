"""Clips that are already cut: .npz files of uint8 frames, `(T, H, W, 3)`.

Owns: the layout of such a file (key `frames`, else the only array), its header and its frames. It
is in data/, not in media/, because manifests and `train` read the headers, and `train` must not
import media/. Must not know: manifests, captions.
Dimensions: t frames, h height, w width in px.
"""

import zipfile
from math import prod
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np
from jaxtyping import UInt8

from wanlora.core.buckets import Bucket, problem_with
from wanlora.core.fingerprint import sha256_of
from wanlora.core.out_of_memory import is_out_of_memory
from wanlora.errors import MediaError, PassingError

FRAMES_KEY = "frames"


class Header(NamedTuple):
    """Header of the array that holds the frames.

    Attributes:
        key: Name of the array.
        shape: Declared shape.
        dtype: Declared type.
        num_bytes: Bytes in the file after the header, uncompressed.
    """

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    num_bytes: int


def read_header(file: IO[bytes]) -> Header:
    """Read the header of the frames of an .npz, not the frames.

    Raises:
        ValueError: It is not an .npz, or it has no `frames` and not exactly one array.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            key = frames_key([name.removesuffix(".npy") for name in archive.namelist()])
            size = _member_size(archive.getinfo(f"{key}.npy"))
            with archive.open(f"{key}.npy") as member:
                version = np.lib.format.read_magic(member)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(member)
                num_bytes = size - member.tell()
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as error:  # a damaged member raises any of zlib.error, RuntimeError, KeyError
        raise ValueError(f"not an .npz file ({error})") from error
    return Header(key, shape, dtype, num_bytes)


def _member_size(member: zipfile.ZipInfo) -> int:
    """Uncompressed size of a member. Reading stops there even if the data unpack to more."""
    if member.compress_type == zipfile.ZIP_STORED and member.compress_size != member.file_size:
        raise ValueError(
            f"{member.filename}: expected {member.file_size:,} bytes, found "
            f"{member.compress_size:,}"
        )
    return member.file_size


def frames_key(names: list[str]) -> str:
    """Name of the array that holds the frames: `frames`, else the only one.

    Raises:
        ValueError: There is no such array.
    """
    if FRAMES_KEY in names:
        return FRAMES_KEY
    if len(names) == 1:
        return names[0]
    found = ", ".join(names) or "none"
    raise ValueError(f"expected an array named {FRAMES_KEY}, or a single array; found {found}")


def layout_problem(header: Header) -> str | None:
    """Describe what is wrong with the layout; None if it is `(T, H, W, 3)` uint8 and complete."""
    if header.dtype != np.uint8:
        return f"array {header.key}: expected uint8, found {header.dtype}"
    if len(header.shape) != 4 or header.shape[3] != 3:
        return (
            f"array {header.key}: expected shape (frames, height, width, 3), found {header.shape}"
        )
    if prod(header.shape) != header.num_bytes:
        return (
            f"array {header.key}: expected {prod(header.shape):,} bytes for shape {header.shape}, "
            f"found {header.num_bytes:,}"
        )
    return None


def read_size(path: Path) -> Bucket:
    """Size of the clip in an .npz, from its header alone.

    Raises:
        MediaError: missing; bad_npz for a wrong container, key, type or layout; bad_size for a
            size that Wan's VAE would silently cut.
    """
    try:
        with path.open("rb") as file:
            header = read_header(file)
    except FileNotFoundError:
        raise MediaError("missing", f"{path}: there is no such file") from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise MediaError("bad_npz", f"{path}: {error}") from None
    if problem := layout_problem(header):
        raise MediaError("bad_npz", f"{path}: {problem}")
    bucket = Bucket(*header.shape[:3])
    if problem := problem_with(bucket):
        raise MediaError("bad_size", f"{path}: {problem}")
    return bucket


def size_or_zeros(path: Path) -> tuple[int, int, int]:
    """Frames, height and width of an .npz clip; zeros if it cannot be read."""
    try:
        with path.open("rb") as file:
            header = read_header(file)
    except (OSError, ValueError):
        return 0, 0, 0
    if layout_problem(header):
        return 0, 0, 0
    return cast("tuple[int, int, int]", header.shape[:3])


def read(path: Path) -> UInt8[np.ndarray, "t h w 3"]:
    """Read the frames of a clip: array `frames`, else the only one; pickles are never opened.

    Raises:
        MediaError: As `read_size`, and bad_npz when the data are damaged.
    """
    return _read(path, hashed=False)[0]


def read_hashed(path: Path) -> tuple[UInt8[np.ndarray, "t h w 3"], str]:
    """Read the frames of a clip, and hash its file.

    Returns:
        The frames, and the hex sha256 of the open file, also if another file replaces it.

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
                frames: np.ndarray = archive[frames_key(archive.files)]
    except Exception as error:  # zlib, zipfile, EOF: a damaged member raises any of them
        if is_out_of_memory(error):
            raise
        raise MediaError("bad_npz", f"{path} is damaged: {error}") from None
    if frames.shape[:3] != tuple(bucket):
        raise PassingError("changed", f"{path} was replaced while it was read; read it again")
    return frames, digest


def read_checked(path: Path) -> Bucket:
    """Read all of a clip to check that it is complete.

    Raises:
        MediaError: As `read`.
    """
    return Bucket(*read(path).shape[:3])
