"""Latents and prompt embeddings of a cache for one encoder of each kind.

Owns: the check that a view's rows are there, and their digest. Legend: as in schema.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from wanlora.core import units
from wanlora.core.location import Location
from wanlora.errors import MissingRowsError, StoreError
from wanlora.store import index, schema
from wanlora.store.row_reader import RowReader
from wanlora.store.rows import Rows
from wanlora.store.schema import Kind
from wanlora.store.views import View
from wanlora.store.writer import NormalEquations


class StoreReader:
    """Latents and prompt embeddings of a cache, for one encoder of each kind.

    `digest` identifies the rows this reader was opened with: their keys, places and checksums.

    Args:
        cache: Cache folder.
        latents: Whole fingerprint of the latents.
        text: Whole fingerprint of the prompt embeddings.
        latents_provenance: Weights and settings of the latents, for error messages.
        text_provenance: Weights and settings of the text encoder, for error messages.
        local_copy: Folder for copies of rows, written at the first read and read from then on; for
            a remote cache.

    Raises:
        StoreError: There is no store.
        StoreVersionError: The store has another version.
        StaleStoreError: The store has no rows made with these weights and settings.
    """

    def __init__(
        self,
        cache: Location,
        *,
        latents: str,
        text: str,
        latents_provenance: Mapping[str, Any] | None = None,
        text_provenance: Mapping[str, Any] | None = None,
        local_copy: Path | None = None,
    ) -> None:
        index.open_store(cache)
        index.require_fingerprint(cache, "latents", latents, latents_provenance)
        index.require_fingerprint(cache, "text", text, text_provenance)
        self._cache = cache
        self._fingerprints: dict[Kind, str] = {"latents": latents, "text": text}
        self._latents = RowReader.of_generation(
            cache, "latents", latents, index.committed(cache, "latents", latents),
            local_copy=local_copy,
        )  # fmt: skip
        self._text = RowReader.of_generation(
            cache, "text", text, index.committed(cache, "text", text), local_copy=local_copy
        )
        self.digest = _digest((self._latents.rows, self._text.rows))

    @classmethod
    def of_view(
        cls, cache: Location, view: View, *, local_copy: Path | None = None
    ) -> "StoreReader":
        """Open what a view names, and check that every row of it is there.

        Raises:
            MissingRowsError: See `require`.
        """
        reader = cls(
            cache,
            latents=view.latents,
            text=view.text,
            latents_provenance=view.latents_provenance,
            text_provenance=view.text_provenance,
            local_copy=local_copy,
        )
        reader.require(view)
        return reader

    def keep_index(self) -> None:
        """Write a snapshot of the committed rows for later processes (`index.keep`).

        Raises:
            StoreError: The cache cannot be written.
        """
        for kind, fingerprint in self._fingerprints.items():
            rows = (self._latents if kind == "latents" else self._text).rows
            index.keep(self._cache, kind, fingerprint, rows)

    def missing(
        self, clip_keys: Iterable[str], prompt_keys: Iterable[str]
    ) -> tuple[list[str], list[str]]:
        """Return the keys of the rows that the store does not have, in the given order."""
        return (
            self._latents.rows.missing(list(clip_keys)),
            self._text.rows.missing(list(prompt_keys)),
        )

    def require(self, view: View) -> None:
        """Refuse a view with a missing row.

        Raises:
            MissingRowsError: Contains the number of missing rows and the first few names.
        """
        clips, prompts = self.missing((clip.key for clip in view.clips), view.prompt_keys())
        if not clips and not prompts:
            return
        lost = set(clips)
        names = [clip.clip_id for clip in view.clips if clip.key in lost]
        raise MissingRowsError(
            f"{self._cache / schema.STORE} lacks {_count(names, 'clip')} and "
            f"{_count(prompts, 'prompt')} of view {view.name!r}; encode them with: "
            f"wanlora cache-latents --cache {self._cache} --view {view.name}"
        )

    def latents(self, key: str) -> Float[np.ndarray, "c f h w"]:
        """Normalised latents of a clip, in the stored dtype. Raises as `RowReader.read`."""
        return self._latents.read(key)

    def prompt_embeds(self, key: str) -> Float[np.ndarray, "l d"]:
        """Read the embedding of a prompt, without padding, in the stored dtype. Raises the same."""
        return self._text.read(key)

    def prompts(self, keys: Iterable[str]) -> dict[str, str]:
        """Cleaned text of prompts by key, from the commit records of their segments.

        Raises:
            StoreError: A record cannot be read.
        """
        return {key: str(text) for key, text in self._text.sources(keys).items()}

    def latent_rgb(self) -> NormalEquations:
        """Sum of the normal equations of the first segments, for `store.latent_rgb.solve`.

        Raises:
            StoreError: No segment has any, or a record cannot be read.
        """
        found = self._latents.latent_rgb()
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
