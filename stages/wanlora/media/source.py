"""Identity of a source file, and the errors of reading one.

Owns: the sha256 of a file's bytes, stored by (path, size, mtime); the check that a file does not
change while it is read; the translation of libraries' errors. Imports no torch, so that the
processes that check videos start quickly.
"""

import json
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from wanlora.core.fingerprint import sha256_of
from wanlora.core.out_of_memory import is_out_of_memory
from wanlora.core.text import LFS_REMEDY
from wanlora.errors import MediaError, PassingError, WanloraError
from wanlora.files import is_lfs_pointer

SOURCES = "sources.json"
"""File of known hashes: in a cache with absolute paths, beside a manifest with the manifest's."""

SourceHashes = MutableMapping[str, tuple[int, int, str]]
"""(size in bytes, mtime in ns, hex sha256), by absolute path."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Replace every error of a library for a source file by a MediaError that names the file.

    Out-of-memory errors are not replaced, because the file may be fine. Neither are wanlora's own
    errors.

    Raises:
        MediaError: missing or unreadable.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if is_lfs_pointer(path):
            raise MediaError("unreadable", f"{path} {LFS_REMEDY}") from error
        if isinstance(error, PassingError):
            raise
        if _is_empty(path):
            raise MediaError(
                "unreadable", f"{path} is empty (0 bytes); copy or download it again"
            ) from None
        if isinstance(error, WanloraError):
            raise
        if isinstance(error, FileNotFoundError) and not path.exists():
            raise MediaError("missing", f"{path}: there is no such file") from None
        raise MediaError(
            "unreadable", f"{path}: reading it fails with {type(error).__name__}: {error!s:.300}"
        ) from error


Stamp = tuple[int, int]
"""Size in bytes and mtime in ns: identifies a version of a file without reading it."""


@contextmanager
def unchanged(path: Path) -> Iterator[Stamp]:
    """Yield a file's stamp, and refuse the file if the stamp has changed when the block ends.

    Raises:
        MediaError: missing; unreadable, if it is a pipe, a device or a folder.
        PassingError: changed, or unreadable.
    """
    before = _stamp(path)
    yield before
    if (after := _stamp(path)) != before:
        raise PassingError(
            "changed",
            f"{path} was changed while it was read: {before[0]:,} bytes before, {after[0]:,} "
            "after; run the same command again",
        )


def _stamp(path: Path) -> Stamp:
    with _translated(path):
        found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for its writer
        raise MediaError("unreadable", f"{path} is not a regular file; expected a file with data")
    return found.st_size, found.st_mtime_ns


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise MediaError("missing", f"{path}: there is no such file") from None
    except OSError as error:
        raise PassingError("unreadable", f"{path}: {error}") from None


def source_sha256(
    path: Path, known: SourceHashes | None = None, *, alive: Callable[[], None] = lambda: None
) -> str:
    """Hex sha256 of a file's bytes, stored by (path, size, mtime).

    Args:
        path: The file.
        known: Known hashes; this one is added.
        alive: Called after every few megabytes.

    Raises:
        MediaError: missing.
        PassingError: changed while it was hashed, or unreadable.
    """
    with unchanged(path) as stamp:
        entry = known.get(str(path)) if known is not None else None
        if entry is not None and tuple(entry[:2]) == stamp:
            return entry[2]
        with _translated(path), path.open("rb") as file:
            digest = sha256_of(file, alive=alive)
    if known is not None:
        known[str(path)] = (*stamp, digest)
    return digest


def hash_all(
    paths: Iterable[Path], known: SourceHashes, *, threads: int, step: Callable[[], object]
) -> tuple[dict[Path, str | MediaError], int]:
    """Hash files in threads (hashlib computes without the GIL); known ones are not read.

    Args:
        paths: Files without repeats.
        known: Known hashes; new ones are added.
        threads: Number of files at a time.
        step: Called after each file.

    Returns:
        Hash of each file, or the reason that there is none; and the number of bytes read.
    """

    def work(path: Path) -> tuple[str | MediaError, int]:
        before = known.get(str(path))
        try:
            digest: str | MediaError = source_sha256(path, known)
        except MediaError as error:
            return error, 0
        after = known[str(path)]
        return digest, 0 if after == before else after[0]

    paths, found, num_bytes = list(paths), {}, 0
    with ThreadPoolExecutor(threads, thread_name_prefix="hash") as pool:
        for path, (outcome, size) in zip(paths, pool.map(work, paths), strict=True):
            found[path] = outcome
            num_bytes += size
            step()
    return found, num_bytes


def parse_hashes(document: bytes | None) -> dict[str, tuple[int, int, str]]:
    """Hashes that `hashes_document` wrote; empty if there is no document or it is damaged.

    A document only saves time, so a damaged one is made again and not refused.
    """
    try:
        entries = json.loads(document or b"{}")
        return {
            path: (int(size), int(mtime), str(sha)) for path, (size, mtime, sha) in entries.items()
        }
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}


def hashes_document(known: Mapping[str, tuple[int, int, str]]) -> bytes:
    """Hashes for the next run, as a file."""
    return json.dumps(dict(known), sort_keys=True, indent=0).encode()


def _is_empty(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size == 0
    except (OSError, ValueError):  # a name that no file can have
        return False
