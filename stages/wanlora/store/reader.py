"""Latents, prompt embeddings and image conditions of a cache, for one encoder of each kind.

Owns: the check that a view's rows are there, and their digest. Legend: as in schema.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from wanlora.core import units
from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.errors import MissingRowsError, StaleStoreError, StoreError
from wanlora.store import index, schema
from wanlora.store.row_reader import RowReader
from wanlora.store.rows import Rows
from wanlora.store.views import Encoding, View
from wanlora.store.writer import NormalEquations


class StoreReader:
    """Rows of a cache, for one encoder of each kind.

    `digest` identifies the rows this reader was opened with: their keys, places and checksums.

    Args:
        cache: Cache folder.
        encodings: Encoder of each kind to read.
        local_copy: Folder for copies of rows, written at the first read and read from then on; for
            a remote cache.

    Raises:
        StoreError: There is no store.
        StoreVersionError: The store has another version.
        StaleStoreError: The store has no rows of a kind made with these weights and settings.
    """

    def __init__(
        self,
        cache: Location,
        *,
        encodings: Mapping[Kind, Encoding],
        local_copy: Path | None = None,
    ) -> None:
        index.open_store(cache)
        self._cache = cache
        self._fingerprints = {kind: each.fingerprint for kind, each in encodings.items()}
        for kind, each in encodings.items():
            index.require_fingerprint(cache, kind, each.fingerprint, each.provenance)
        self._rows = {
            kind: RowReader.of_generation(
                cache, kind, fingerprint, index.committed(cache, kind, fingerprint),
                local_copy=local_copy,
            )
            for kind, fingerprint in self._fingerprints.items()
        }  # fmt: skip
        self.digest = _digest(reader.rows for reader in self._rows.values())

    @classmethod
    def of_view(
        cls,
        cache: Location,
        view: View,
        kinds: Collection[Kind] | None = None,
        *,
        local_copy: Path | None = None,
    ) -> "StoreReader":
        """Open what a view names, and check that every row of it is there.

        Args:
            cache: Cache folder.
            view: The view.
            kinds: Kinds of rows to read; None = all of the view.
            local_copy: As for the class.

        Raises:
            StaleStoreError: The view lacks a kind, or see the class.
            MissingRowsError: See `require`.
        """
        if lacking := [kind for kind in kinds or () if kind not in view.kinds]:
            raise StaleStoreError(
                f"view {view.name!r} of {cache} has no {', '.join(lacking)}: it was made for "
                f"{view.variant}; to add it, run wanlora cache-latents --cache {cache} "
                f"--view {view.name} with --model set to the model that needs it"
            )
        read = [kind for kind in view.kinds if kinds is None or kind in kinds]
        encodings = {kind: view.encodings[kind] for kind in read}
        reader = cls(cache, encodings=encodings, local_copy=local_copy)
        reader.require(view)
        return reader

    def keep_index(self) -> None:
        """Write a snapshot of the committed rows for later processes (`index.keep`).

        Raises:
            StoreError: The cache cannot be written.
        """
        for kind, fingerprint in self._fingerprints.items():
            index.keep(self._cache, kind, fingerprint, self._rows[kind].rows)

    def missing(self, kind: Kind, keys: Iterable[str]) -> list[str]:
        """Return the keys of the rows of a kind that the store does not have, in order."""
        return self._rows[kind].rows.missing(list(keys))

    def require(self, view: View) -> None:
        """Refuse a view with a missing row of a kind that this reader reads.

        Raises:
            MissingRowsError: Contains the number of missing rows and the first few names, by kind.
        """
        missing = {kind: self.missing(kind, view.keys(kind)) for kind in self._rows}
        if not any(missing.values()):
            return
        names = {clip.key: clip.clip_id for clip in view.clips}
        lacking = [
            f"{kind} of {_count([names.get(key, key) for key in keys], _noun(kind))}"
            for kind, keys in missing.items()
            if keys
        ]
        raise MissingRowsError(
            f"{self._cache / schema.STORE} lacks {' and '.join(lacking)} of view {view.name!r}; "
            f"encode them with: wanlora cache-latents --cache {self._cache} --view {view.name}"
        )

    def latents(self, key: str) -> Float[np.ndarray, "c f h w"]:
        """Normalised latents of a clip, in the stored dtype. Raises as `RowReader.read`."""
        return self._rows["latents"].read(key)

    def prompt_embeds(self, key: str) -> Float[np.ndarray, "l d"]:
        """Read the embedding of a prompt, without padding, in the stored dtype. Raises the same."""
        return self._rows["text"].read(key)

    def cond_latents(self, key: str) -> Float[np.ndarray, "c f h w"]:
        """Normalised latents of a clip's first frame followed by zeros. Raises the same."""
        return self._rows["cond_latents"].read(key)

    def clip_vision(self, key: str) -> Float[np.ndarray, "l d"]:
        """CLIP's embedding of a clip's first frame. Raises the same."""
        return self._rows["clip_vision"].read(key)

    def prompts(self, keys: Iterable[str]) -> dict[str, str]:
        """Cleaned text of prompts by key, from the commit records of their segments.

        Raises:
            StoreError: A record cannot be read.
        """
        return {key: str(text) for key, text in self._rows["text"].sources(keys).items()}

    def latent_rgb(self) -> NormalEquations:
        """Sum of the normal equations of the first segments, for `store.latent_rgb.solve`.

        Raises:
            StoreError: No segment has any, or a record cannot be read.
        """
        found = self._rows["latents"].latent_rgb()
        if found is None:
            raise StoreError(
                f"no segment in {self._cache / schema.STORE} carries latent_rgb, so latents cannot "
                "be shown without the VAE; decode them with wanlora sample"
            )
        return found


def _digest(tables: Iterable[Rows]) -> str:
    digest = hashlib.sha256()
    for rows in tables:
        digest.update("\n".join(rows.segments).encode())
        for column in (rows.row_keys, rows.segment_indices, rows.places, rows.crc32c):
            digest.update(column.tobytes())
    return digest.hexdigest()


def _count(names: Sequence[str], noun: str) -> str:
    listed = f" ({units.names(names, most=5)})" if names else ""
    return units.count(len(names), noun) + listed


def _noun(kind: Kind) -> str:
    return "clip" if schema.KINDS[kind].per_clip else "prompt"
