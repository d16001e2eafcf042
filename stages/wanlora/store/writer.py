"""Write segments. Many processes may write at once, and a kill at any time leaves no wrong row.

Owns: the commit order: parent groups, the segment's shards, its arrays' documents, and last its
group document, the commit record. No object is appended to, resized or rewritten.
Legend: as in schema.
"""

import logging
import os
import secrets
import socket
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from wanlora import __version__
from wanlora.core.fingerprint import fingerprint as fingerprint_of
from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.errors import StoreError
from wanlora.store import arrays, condemned, schema, storage
from wanlora.store.groups import write_groups

ATTEMPTS = 3
"""Maximum number of attempts to write a segment; a second attempt is rare."""

log = logging.getLogger(__name__)

NormalEquations = tuple[Float64[np.ndarray, "k k"], Float64[np.ndarray, "k 3"]]


class SegmentWriter:
    """Buffers rows of one kind and shape, and publishes them as immutable segments.

    Leaving the context publishes the buffered rows: on success, after an error and after Ctrl-C.

    Args:
        cache: Cache folder.
        kind: Kind of the rows.
        provenance: Provenance of the encoder; its fingerprint is part of the path.
        shape: Shape of a row: (C, F, H, W), or (512, D).
        dtype: Stored type, float16 or float32.
        rows: Maximum number of rows per segment.
        max_bytes: Maximum raw bytes per segment; a single larger row gets its own segment.
        max_seconds: Maximum seconds of work per segment, which is the most that a kill can lose.
        mantissa_bits: Number of mantissa bits that rows are rounded to; None keeps all.
        writer: Description of this process, recorded beside the rows for people to read.
    """

    def __init__(
        self,
        cache: Location,
        *,
        kind: Kind,
        provenance: Mapping[str, Any],
        shape: tuple[int, ...],
        dtype: str,
        rows: int,
        max_bytes: int,
        max_seconds: float,
        mantissa_bits: int | None = None,
        writer: Mapping[str, Any] | None = None,
    ) -> None:
        self._layout = schema.KINDS[kind]
        assert shape == self._layout.shape(shape), shape
        self.fingerprint = fingerprint_of(provenance)
        self._cache = cache
        self._kind: Kind = kind
        self._provenance = dict(provenance)
        self._shape = shape
        self._dtype = np.dtype(dtype)
        self._limits = rows, max_bytes, max_seconds
        self._mantissa_bits = mantissa_bits
        self._writer = {"wanlora": __version__, "host": socket.gethostname()} | dict(writer or {})
        self._groups_written = False
        self._seen: set[str] = set()
        self._since = time.monotonic()
        self._clear()

    def _clear(self) -> None:
        self._keys: list[str] = []
        self._rows: list[np.ndarray] = []
        self._sources: list[Any] = []
        self._rgb: list[NormalEquations] = []
        self._num_bytes = 0

    def add(
        self,
        key: str,
        array: Float[np.ndarray, "..."],
        *,
        source: Mapping[str, Any] | str | None = None,
        rgb: NormalEquations | None = None,
    ) -> None:
        """Buffer a row, and publish a segment when a limit is reached.

        A key that this writer has already written is skipped: equal keys mean equal rows.

        Args:
            key: Clip key or prompt key.
            array: Latents `[C, F, H, W]`, or prompt_embeds `[L, D]` with 1 <= L <= 512.
            source: Origin of the row, for people to read: the clip's cut, or the prompt.
            rgb: Normal equations of this row (`store.latent_rgb.normal_equations`).

        Raises:
            StoreError: A value is not finite once it has the stored type, or the disk refuses.
        """
        if key in self._seen:
            return
        row = self._stored(key, array)
        limit_rows, limit_bytes, limit_s = self._limits
        if self._rows and self._num_bytes + row.nbytes > limit_bytes:
            self.flush()
        self._keys.append(key)
        self._rows.append(row)
        self._sources.append(source)
        self._rgb += [rgb] if rgb is not None else []
        self._num_bytes += row.nbytes
        self._seen.add(key)
        if len(self._rows) >= limit_rows or time.monotonic() - self._since >= limit_s:
            self.flush()

    def _stored(self, key: str, array: Float[np.ndarray, "..."]) -> np.ndarray:
        """Copy a row to the stored type, in C order."""
        if self._layout.max_length is None:
            assert array.shape == self._shape, (array.shape, self._shape)
        else:
            assert array.shape[1:] == self._shape[1:], (array.shape, self._shape)
            assert 1 <= len(array) <= self._shape[0], array.shape
        with np.errstate(over="ignore"):  # what overflows is counted below
            row = array.astype(self._dtype, order="C", copy=True)
            if self._mantissa_bits is not None:
                row = arrays.round_mantissa(row, self._mantissa_bits)
        if bad := int(np.count_nonzero(~np.isfinite(row))):
            raise StoreError(
                f"{self._kind} row {key}: {bad} of {row.size} values are not finite as "
                f"{self._dtype} (largest before the cast: {np.abs(array).max():g}); the encoder's "
                "weights or dtype are wrong, or store with --set store.dtype=float32"
            )
        return row

    def flush(self) -> None:
        """Publish the buffered rows; they stay buffered for another try if the disk refuses.

        Raises:
            StoreError: The disk or the object store refuses, or loses what was written.
        """
        if self._rows:
            self._write_groups()
            for _ in range(ATTEMPTS):
                if self._publish():
                    break
            else:
                raise StoreError(
                    f"parts of a segment in {self._cache / schema.STORE} were gone right after "
                    f"they were written, {ATTEMPTS} times; does another program delete files there?"
                )
            self._clear()
        self._since = time.monotonic()

    def _publish(self) -> bool:
        """Write a segment; False if a collection removed parts of it as those of a dead writer.

        A collection publishes the list of what it removes, looks for the commit record, and then
        removes. This writes the record, and then looks for the list and the parts. So a record
        without its parts does not stay.
        """
        parent = schema.segments_key(self._kind, self.fingerprint, self._shape)
        segment = f"{parent}/{secrets.token_hex(8)}"
        built = arrays.build(self._kind, self._rows, self._commit())
        for name, data in built:
            storage.at(self._cache).put(f"{segment}/{name}", data)
        taken = segment in condemned.segments(self._cache)  # the list first: it goes last
        found = storage.at(self._cache).listing(segment)
        sizes = {key: entry.num_bytes for key, entry in found.items()}
        if not taken and sizes == {f"{segment}/{name}": len(data) for name, data in built}:
            return True
        storage.at(self._cache).remove(f"{segment}/{schema.GROUP}")
        storage.at(self._cache).remove_tree(segment)
        return False

    def _commit(self) -> dict[str, Any]:
        commit: dict[str, Any] = {
            "kind": "segment",
            "version": schema.VERSION,
            "fingerprint": self.fingerprint,
            "count": len(self._keys),
            "keys": self._keys,
            "crc32c": {self._layout.array: [arrays.crc32c(row) for row in self._rows]},
            self._layout.origins: self._sources,
            "writer": self._writer | {"pid": os.getpid(), "time": int(time.time())},
        }
        if self._rgb:
            gram = np.sum([gram for gram, _ in self._rgb], axis=0)
            cross = np.sum([cross for _, cross in self._rgb], axis=0)
            commit["latent_rgb"] = {"gram": gram.tolist(), "cross": cross.tolist()}
        return commit

    def _write_groups(self) -> None:
        if not self._groups_written:
            write_groups(self._cache, self._kind, self._provenance, self._shape)
            self._groups_written = True

    def close(self) -> None:
        """Publish the buffered rows."""
        self.flush()

    def __enter__(self) -> "SegmentWriter":  # noqa: PYI034  (beartype refuses Self here)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.flush()
            return
        try:
            self.flush()
        except StoreError as second:  # the first error is the cause
            log.warning("%d encoded rows were lost: %s", len(self._rows), second)
