"""The frames inside an .npz clip: which array they are, and its header without its data.

Owns: the layout of the seed's clips: key `frames`, else the only array. Works on an open file.
"""

import zipfile
from math import prod
from typing import IO, NamedTuple

import numpy as np

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
        ValueError: It is no .npz, or it has no `frames` and not exactly one array.
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
    """Uncompressed size of a member; reading stops there, whatever the data unpack to."""
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
