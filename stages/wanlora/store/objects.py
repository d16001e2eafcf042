"""Objects of a cache folder: atomic put, get and listing.

Owns: every write under a cache folder. An object is a key (`/` between names) under a root; it is
whole or absent, whatever happens to the machine. Must not know: Zarr, segments, views. Another
place to keep objects (S3) means another set of these functions.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wanlora.errors import StoreError
from wanlora.files import fsync_dir, publish

PARTIAL = ".partial"
"""Folder of half-written files, beside the store and the views: no reader ever looks into it."""


def put(root: Path, key: str, data: bytes) -> None:
    """Write an object: it appears whole, and stays through a power cut, or not at all.

    Temporary file, fsync, rename, fsync of the folder: the order that a journalled file system
    needs for both promises.

    Raises:
        StoreError: The disk is full, read-only or broken; names the path.
    """
    target = root / key
    temporary = root / PARTIAL / uuid.uuid4().hex
    with _naming("write", target):
        make_folder(temporary.parent)
        make_folder(target.parent)
        try:
            temporary.write_bytes(data)
            publish(temporary, target)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def get(root: Path, key: str) -> bytes | None:
    """Read an object, or None when there is none.

    Raises:
        StoreError: It exists and cannot be read; names the path.
    """
    path = root / key
    with _naming("read", path):
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None


def folders(root: Path, key: str) -> list[str]:
    """Names of the folders directly under a key, sorted; none when it does not exist."""
    path = root / key
    with _naming("list", path):
        try:
            with os.scandir(path) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []


def files(root: Path, key: str) -> list[str]:
    """Names of the objects directly under a key, sorted; none when it does not exist."""
    path = root / key
    with _naming("list", path):
        try:
            with os.scandir(path) as entries:
                return sorted(entry.name for entry in entries if entry.is_file())
        except (FileNotFoundError, NotADirectoryError):
            return []


def num_bytes(root: Path, key: str) -> int:
    """Sum of the sizes of all objects under a key."""
    with _naming("list", root / key):
        return sum(path.stat().st_size for path in (root / key).rglob("*") if path.is_file())


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, each of them synced into the folder above it."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_dir(folder.parent)


@contextmanager
def _naming(verb: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot {verb} {path}: {error.strerror or error}; check the disk's free space and "
            "the folder's permissions, or choose another folder with --cache"
        ) from error
