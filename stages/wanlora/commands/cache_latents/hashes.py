"""Hashes that earlier runs computed, so that no large file is read twice.

Owns: the files with these hashes: in the cache, beside manifests, and in the user's cache folder.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wanlora.core.location import Location, cache_home
from wanlora.data.source_paths import source_path
from wanlora.errors import OutputError
from wanlora.files import write_atomic
from wanlora.media.source import SOURCES, SourceHashes, hashes_document, parse_hashes
from wanlora.store import storage
from wanlora.wan import identity

WEIGHTS = "weights.json"
DIGESTS = "encoders.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hashes:
    """Hashes of files by path, size and mtime, so that a second run reads no big file again.

    Attributes:
        sources: Hashes of source files.
        weights: Hashes of files of weights.
        digests: Digests of encoders.
    """

    sources: SourceHashes
    weights: SourceHashes
    digests: identity.Memo

    @classmethod
    def read(cls, cache: Location, manifests: Sequence[Path] = ()) -> "Hashes":
        """Read the known hashes: those of sources from the cache, and from beside the manifests."""
        sources = _beside(manifests)
        for path, entry in parse_hashes(storage.at(cache).get(SOURCES)).items():
            if path not in sources or sources[path][1] <= entry[1]:
                sources[path] = entry
        return cls(
            sources,
            parse_hashes(_kept(WEIGHTS)),
            kept_digests(),
        )

    def move_sources(self, moved: Mapping[Path, Path]) -> None:
        """Use the hashes of sources for the same files at new paths; size and mtime still count."""
        for before, now in moved.items():
            if (entry := self.sources.get(str(before))) is not None:
                self.sources.setdefault(str(now), entry)

    def write_sources(self, cache: Location) -> None:
        """Write the hashes of sources into the cache, for the next run.

        Raises:
            StoreError: The cache folder cannot be written.
        """
        storage.at(cache).put(SOURCES, hashes_document(self.sources))

    def keep_weights(self) -> None:
        """Write the hashes of weights (22 GB to read) into the user's cache folder."""
        try:
            cache_home().mkdir(parents=True, exist_ok=True)
            write_atomic(cache_home() / WEIGHTS, hashes_document(self.weights))
            write_atomic(cache_home() / DIGESTS, identity.memo_document(self.digests))
        except (OSError, OutputError) as error:  # they only save time
            log.info("the hashes of the weights are not kept: %s", error)


def _beside(manifests: Sequence[Path]) -> dict[str, tuple[int, int, str]]:
    """Hashes that `prepare` left beside its manifests, by absolute path."""
    found = {}
    for folder in dict.fromkeys(path if path.is_dir() else path.parent for path in manifests):
        try:
            document = (folder / SOURCES).read_bytes()
        except OSError:  # the sources are hashed again
            continue
        for name, entry in parse_hashes(document).items():
            found[str(source_path(name, folder))] = entry
    return found


def _kept(name: str) -> bytes | None:
    try:
        return (cache_home() / name).read_bytes()
    except OSError:
        return None


def kept_digests() -> identity.Memo:
    """Digests of encoders that this user's processes have computed."""
    return identity.parse_memo(_kept(DIGESTS))
