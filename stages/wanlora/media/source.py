"""Identity of a source file, and the errors of reading one.

Owns: the sha256 of a file's bytes and its memory by (path, size, mtime); the translation of what
libraries raise. Imports no torch, so that the processes that check videos start quickly.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from wanlora.core.out_of_memory import is_out_of_memory
from wanlora.errors import MediaError, WanloraError

BLOCK_BYTES = 4 * 2**20

SourceHashes = MutableMapping[str, tuple[int, int, str]]
"""Absolute path to (size in bytes, mtime in ns, hex sha256)."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a library raises for a source file into a MediaError that names the file.

    Running out of memory is not turned: the file may be fine. Neither are wanlora's own errors.

    Raises:
        MediaError: missing or unreadable.
    """
    try:
        yield
    except WanloraError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if isinstance(error, FileNotFoundError) and not path.exists():
            raise MediaError("missing", f"{path}: there is no such file") from None
        raise MediaError(
            "unreadable", f"{path}: reading it fails with {type(error).__name__}: {error!s:.300}"
        ) from error


def source_sha256(
    path: Path, known: SourceHashes | None = None, *, alive: Callable[[], None] = lambda: None
) -> str:
    """Hex sha256 of a file's bytes, remembered by (path, size, mtime).

    Args:
        path: The file.
        known: Hashes from before; this one is added.
        alive: Called after every few megabytes.

    Raises:
        MediaError: missing.
    """
    try:
        stat = path.stat()
        stamp = (stat.st_size, stat.st_mtime_ns)
        entry = known.get(str(path)) if known is not None else None
        if entry is not None and tuple(entry[:2]) == stamp:
            return entry[2]
        running = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                running.update(block)
                alive()
        digest = running.hexdigest()
    except FileNotFoundError:
        raise MediaError("missing", f"{path}: there is no such file") from None
    except OSError as error:
        raise MediaError("unreadable", f"{path}: {error}") from None
    if known is not None:
        known[str(path)] = (*stamp, digest)
    return digest


def parse_hashes(document: bytes | None) -> dict[str, tuple[int, int, str]]:
    """Hashes that `hashes_document` wrote; none when there is no document or it is damaged.

    It only saves time, so a damaged one is made again rather than refused.
    """
    try:
        entries = json.loads(document or b"{}")
        return {
            path: (int(size), int(mtime), str(sha)) for path, (size, mtime, sha) in entries.items()
        }
    except (ValueError, TypeError, AttributeError):
        return {}


def hashes_document(known: SourceHashes) -> bytes:
    """Hashes for the next run, as a file."""
    return json.dumps(dict(known), sort_keys=True, indent=0).encode()
