"""Read rows at random, each checked against its checksum.

Owns: the way from a key to an array. Thread-safe: 2-4 threads read ahead of the training loop; no
processes (8 ms of CPU a clip do not need them).
Legend: as in schema.
"""

import hashlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Float, Float64, UInt16

from wanlora.core.location import Location
from wanlora.errors import CorruptRowError, MissingRowsError, StoreError
from wanlora.store import arrays, index, remote, schema
from wanlora.store.copying import LocalCopy
from wanlora.store.index import Row, Segment
from wanlora.store.schema import Kind
from wanlora.store.views import View

FIRST = 5
"""How many missing names a message shows."""


@dataclass(frozen=True, slots=True)
class _Opened:
    values: Mapping[str, "zarr.Array[Any]"]
    lengths: UInt16[np.ndarray, " n"] | None


class RowReader:
    """Rows of one kind under one fingerprint.

    Args:
        cache: Cache folder or URL.
        kind: What the rows are.
        segments: Where they lie (`index.segments_of` of a fingerprint).
        copy: Segments are fetched whole into it on first use, and read from there.
    """

    def __init__(
        self,
        cache: Location,
        kind: Kind,
        segments: Sequence[Segment],
        copy: LocalCopy | None = None,
    ) -> None:
        self.segments = segments
        self.rows = index.rows_of(segments)
        self._cache = cache
        self._kind = kind
        self._copy = copy
        self._records = {segment.key: segment for segment in segments}
        self._opened: dict[str, _Opened] = {}
        self._lock = threading.Lock()

    def read(self, key: str) -> Float[np.ndarray, "..."]:
        """Read a row: latents `[C, F, H, W]`, or prompt_embeds `[L, D]`, in the stored dtype.

        Raises:
            MissingRowsError: The row is not in the store.
            CorruptRowError: Its bytes are not those that were written; names the key.
            StoreError: The disk refuses.
        """
        return self._read(key, schema.ROW_ARRAY[self._kind])

    def read_logvar(self, key: str) -> Float[np.ndarray, "c f h w"] | None:
        """Log-variances beside a clip's latents, None where none are stored. Raises likewise."""
        row = self.rows.get(key)
        if row is not None and schema.LOGVAR not in self.checksums(row.segment):
            return None
        return self._read(key, schema.LOGVAR)

    def checksums(self, segment: str) -> Mapping[str, Sequence[int]]:
        """CRC-32C of each row of a segment, by array."""
        sums: Mapping[str, Sequence[int]] = self._records[segment].record["crc32c"]
        return sums

    def _read(self, key: str, name: str) -> Float[np.ndarray, "..."]:
        row = self.rows.get(key)
        if row is None:
            raise MissingRowsError(
                f"{self._kind} row {key} is not in {self._cache / schema.STORE}; encode it with: "
                f"wanlora cache-latents --cache {self._cache}"
            )
        try:
            return self._checked(key, row, name)
        except CorruptRowError:
            if self._copy is None:
                raise
        self._copy.forget(row.segment)  # perhaps only the copy is damaged: fetch it again
        with self._lock:
            self._opened.pop(row.segment, None)
        return self._checked(key, row, name)

    def _checked(self, key: str, row: Row, name: str) -> Float[np.ndarray, "..."]:
        try:
            values = self._values(row, name)
        except (StoreError, MemoryError):
            raise
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                raise StoreError(f"cannot read {self._cache / row.segment}: {error}") from error
            raise self._corrupt(key, row, "an object is missing") from error
        except Exception as error:  # whatever a codec says of damaged bytes
            if remote.is_refusal(error):
                raise StoreError(f"cannot read {self._cache / row.segment}: {error}") from error
            raise self._corrupt(key, row, f"{type(error).__name__}: {error}") from error
        found = arrays.crc32c(values)
        expected = int(self.checksums(row.segment)[name][row.row])
        if found != expected:
            reason = f"its checksum is {found:08x}, expected {expected:08x}"
            raise self._corrupt(key, row, reason)
        return values

    def _values(self, row: Row, name: str) -> Float[np.ndarray, "..."]:
        opened = self._open(row.segment)
        values = opened.values[name]
        if opened.lengths is None:
            return np.asarray(values[row.row])
        length = int(opened.lengths[row.row])
        if length == 0:
            raise ValueError("its length is 0")
        return np.asarray(values[row.row, :length])

    def _open(self, segment: str) -> _Opened:
        with self._lock:
            if segment in self._opened:
                return self._opened[segment]
        home = self._cache if self._copy is None else self._copy.fetch(segment)
        lengths = None
        if self._kind == "text":
            lengths = np.asarray(arrays.open_array(home, f"{segment}/length")[...])
        names = self.checksums(segment)
        opened = _Opened(
            {name: arrays.open_array(home, f"{segment}/{name}") for name in names}, lengths
        )
        with self._lock:
            return self._opened.setdefault(segment, opened)

    def _corrupt(self, key: str, row: Row, reason: str) -> CorruptRowError:
        source = self.source(row)
        return CorruptRowError(
            f"{self._kind} row {key}{'' if source is None else f' of {source}'} is damaged "
            f"({reason}); encode it again with: wanlora inspect {self._cache} --repair; or delete "
            f"{self._cache / row.segment} and run: wanlora cache-latents --cache {self._cache}"
        )

    def source(self, row: Row) -> Any:
        """What the commit record says of a row: the clip's cut, or the prompt; None of neither."""
        record = self._records[row.segment].record
        sources = record.get("sources") or record.get("prompts") or []
        return sources[row.row] if row.row < len(sources) else None


class StoreReader:
    """Latents and prompt embeddings of a cache, for one encoder of each kind.

    `digest` identifies the rows this reader was opened with: their keys, places and checksums.

    Args:
        cache: Cache folder.
        latents: Whole fingerprint of the latents.
        text: Whole fingerprint of the prompt embeddings.
        latents_provenance: What the fingerprint stands for, to explain a refusal.
        text_provenance: Likewise.
        local_copy: Folder that segments are copied into on first use and read from; for a cache
            that is far away.

    Raises:
        StoreError: There is no store.
        StoreVersionError: It has another version.
        StaleStoreError: Nothing in it was made with these weights and settings.
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
        copy = None if local_copy is None else LocalCopy(cache, local_copy)
        self._latents = RowReader(
            cache, "latents", index.segments_of(cache, "latents", latents), copy
        )
        self._text = RowReader(cache, "text", index.segments_of(cache, "text", text), copy)
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

    def missing(
        self, clip_keys: Iterable[str], prompt_keys: Iterable[str]
    ) -> tuple[list[str], list[str]]:
        """Which of these rows the store does not have, in the given order."""
        return (
            [key for key in clip_keys if key not in self._latents.rows],
            [key for key in prompt_keys if key not in self._text.rows],
        )

    def require(self, view: View) -> None:
        """Refuse a view of which a row is missing.

        Raises:
            MissingRowsError: Says how many, and names the first few.
        """
        clips, prompts = self.missing((clip.key for clip in view.clips), view.prompt_keys())
        if not clips and not prompts:
            return
        lost = set(clips)
        names = [clip.clip_id for clip in view.clips if clip.key in lost]
        raise MissingRowsError(
            f"{self._cache / schema.STORE} lacks {_some(names, 'clips')} and "
            f"{_some(prompts, 'prompts')} of view {view.name!r}; encode them with: "
            f"wanlora cache-latents --cache {self._cache} --view {view.name}"
        )

    def latents(self, key: str) -> Float[np.ndarray, "c f h w"]:
        """Normalised latents of a clip, in the stored dtype. Raises as `RowReader.read`."""
        return self._latents.read(key)

    def logvar(self, key: str) -> Float[np.ndarray, "c f h w"] | None:
        """Log-variances of a clip's latents, None where none are stored. Raises likewise."""
        return self._latents.read_logvar(key)

    def prompt_embeds(self, key: str) -> Float[np.ndarray, "l d"]:
        """Embedding of a prompt without its padding, in the stored dtype. Raises likewise."""
        return self._text.read(key)

    def latent_rgb(self) -> tuple[Float64[np.ndarray, "k k"], Float64[np.ndarray, "k 3"]]:
        """Sum of the segments' normal equations, for `core.latent_rgb.solve`.

        Raises:
            StoreError: No segment carries any.
        """
        found = latent_rgb_of(self._latents.segments)
        if found is None:
            raise StoreError(
                f"no segment in {self._cache / schema.STORE} carries latent_rgb, so latents cannot "
                "be shown without the VAE; decode them with wanlora sample"
            )
        return found


def latent_rgb_of(
    segments: Iterable[Segment],
) -> tuple[Float64[np.ndarray, "k k"], Float64[np.ndarray, "k 3"]] | None:
    """Sum of the normal equations of segments, or None where none carries any."""
    parts = [s.record["latent_rgb"] for s in segments if "latent_rgb" in s.record]
    if not parts:
        return None
    return (
        np.sum([np.asarray(part["gram"], np.float64) for part in parts], axis=0),
        np.sum([np.asarray(part["cross"], np.float64) for part in parts], axis=0),
    )


def _some(names: Sequence[str], noun: str) -> str:
    shown = ", ".join(names[:FIRST]) + (", ..." if len(names) > FIRST else "")
    return f"{len(names)} {noun} ({shown})" if names else f"0 {noun}"


def _digest(tables: Iterable[Mapping[str, Row]]) -> str:
    digest = hashlib.sha256()
    for rows in tables:
        for key, row in sorted(rows.items()):
            digest.update(f"{key} {row.segment} {row.row} {row.crc32c}\n".encode())
    return digest.hexdigest()
