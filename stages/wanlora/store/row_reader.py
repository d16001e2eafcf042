"""Read rows of one kind at random, each checked against its checksum.

Owns: reading the array of a key. Thread-safe: 2-4 threads read ahead of the training loop. A clip
takes 8 ms of CPU, so processes are not needed. Must not know: views. Legend: as in schema.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import zarr
from jaxtyping import Float, UInt16

from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.errors import CorruptRowError, MissingRowsError, StoreError
from wanlora.store import arrays, bucket, commit_records, index, schema, storage
from wanlora.store.commit_records import Segment
from wanlora.store.local_copy import LocalCopy
from wanlora.store.rows import Row, Rows
from wanlora.store.writer import NormalEquations

OPEN_ARRAYS = 1024
"""Maximum number of open arrays, 6 kB each; enough for all of a store of 32,000 clips."""

MOVES = 4
"""Maximum number of places to look for a row. If it was moved, the store is listed again."""

PICTURED = 256
"""Number of segments whose normal equations are summed; 8,192 clips are a sufficient sample."""


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Opened:
    values: "zarr.Array[Any]"
    lengths: UInt16[np.ndarray, " n"] | None


class RowReader:
    """Rows of one kind under one fingerprint.

    A row that cannot be read at its place is read from another segment that has it. If its segment
    is gone, the store is listed again: a collection moves rows while others read them.

    Args:
        cache: Cache folder or URL.
        kind: Kind of the rows.
        rows: Places of the rows (`index.committed`).
        copy: Local copy that rows are written to and read from.
        records: Commit records that were already read, by segment; others are read when needed.
        relist: Returns the current places of the rows; None = `rows` is final.
    """

    def __init__(
        self,
        cache: Location,
        kind: Kind,
        rows: Rows,
        copy: LocalCopy | None = None,
        *,
        records: Mapping[str, Mapping[str, Any]] | None = None,
        relist: Callable[[Rows], Rows] | None = None,
    ) -> None:
        self.rows = rows
        self._cache = cache
        self._kind = kind
        self._array = schema.KINDS[kind].array
        self._copy = copy
        self._records = records or {}
        self._relist = relist
        self._relisting = Lock()
        # A run over a million clips opens every segment: the number of open arrays is bounded.
        self._open = lru_cache(OPEN_ARRAYS)(self._opened)

    @classmethod
    def of_segments(cls, cache: Location, kind: Kind, segments: Sequence[Segment]) -> "RowReader":
        """Rows of segments whose records have been read (`commit_records.read_records`)."""
        records = {segment.key: segment.record for segment in segments}
        return cls(cache, kind, index.rows_of(segments), records=records)

    @classmethod
    def of_generation(
        cls,
        cache: Location,
        kind: Kind,
        fingerprint: str,
        rows: Rows,
        *,
        local_copy: Path | None = None,
    ) -> "RowReader":
        """All rows that are committed under a fingerprint (`index.committed`)."""
        copy = None
        if local_copy is not None:
            copy = LocalCopy(local_copy, schema.fingerprint_key(kind, fingerprint))

        def relist(known: Rows) -> Rows:
            return index.look(cache, kind, fingerprint, known=known)[0]

        return cls(cache, kind, rows, copy, relist=relist)

    def read(self, key: str) -> Float[np.ndarray, "..."]:
        """Read a row: latents `[C, F, H, W]`, or prompt_embeds `[L, D]`, in the stored dtype.

        Raises:
            MissingRowsError: The row is not in the store.
            CorruptRowError: Every copy of the row is damaged; names the key.
            StoreError: The disk or the object store refuses.
        """
        if self._copy is None:
            return self._read_far(key)
        if (row := self._read_near(key)) is not None:
            return row
        with self._copy.locked(key, self._array):
            row = self._read_near(key)  # another process has fetched it meanwhile
            if row is None:
                row = self._read_far(key)
                self._copy.write(key, self._array, row)
        return row

    def _read_near(self, key: str) -> Float[np.ndarray, "..."] | None:
        """Read a row from the local copy; None if it is missing or damaged."""
        assert self._copy is not None
        values = self._copy.read(key, self._array)
        place = self.rows.get(key)
        if values is None or place is None:
            return None
        return values if arrays.crc32c(values) == place.crc32c else None

    def _read_far(self, key: str) -> Float[np.ndarray, "..."]:
        failed: CorruptRowError | None = None
        for _ in range(MOVES):
            rows = self.rows
            copies = rows.copies(key)
            if not copies and failed is None:
                raise self._missing(key)
            for row in copies:
                try:
                    return self.read_at(key, row)
                except CorruptRowError as error:
                    failed = failed or error
            if not any(map(self._is_gone, copies)) or not self._look_again(rows):
                break
        if not self.rows.copies(key):
            raise self._missing(key)
        assert failed is not None
        raise failed

    def _is_gone(self, row: Row) -> bool:
        return storage.at(self._cache).get(f"{row.segment}/{schema.GROUP}") is None

    def _look_again(self, seen: Rows) -> bool:
        """List the store unless another thread has; True if the rows differ from `seen`."""
        if self._relist is None:
            return False
        with self._relisting:
            if self.rows is seen:
                self.rows = self._relist(seen)
        return self.rows is not seen

    def _missing(self, key: str) -> MissingRowsError:
        return MissingRowsError(
            f"{self._kind} row {key} is not in {self._cache / schema.STORE}; encode it with: "
            f"wanlora cache-latents --cache {self._cache}"
        )

    def read_at(self, key: str, row: Row) -> Float[np.ndarray, "..."]:
        """Read one particular copy of a row. Raises the same errors as `read`."""
        try:
            values = self._values(row)
        except (StoreError, MemoryError):
            raise
        except OSError as error:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                raise StoreError(f"cannot read {self._cache / row.segment}: {error}") from error
            raise self._corrupt(key, row, "an object is missing") from error
        except Exception as error:  # codecs and damaged records raise many kinds of errors
            if bucket.is_refusal(error):
                raise StoreError(f"cannot read {self._cache / row.segment}: {error}") from error
            raise self._corrupt(key, row, f"{type(error).__name__}: {error}") from error
        found = arrays.crc32c(values)
        if found != row.crc32c:
            reason = f"its checksum is {found:08x}, expected {row.crc32c:08x}"
            raise self._corrupt(key, row, reason)
        return values

    def _values(self, row: Row) -> Float[np.ndarray, "..."]:
        opened = self._open(row.segment)
        if opened.lengths is None:
            return np.asarray(opened.values[row.row])
        length = int(opened.lengths[row.row])
        if length == 0:
            raise ValueError("its length is 0")
        return np.asarray(opened.values[row.row, :length])

    def _opened(self, segment: str) -> _Opened:
        lengths = None
        if schema.KINDS[self._kind].max_length is not None:
            key = f"{segment}/{schema.LENGTHS}"
            lengths = np.asarray(arrays.open_array(storage.at(self._cache), key)[...])
        return _Opened(
            arrays.open_array(storage.at(self._cache), f"{segment}/{self._array}"), lengths
        )

    def _corrupt(self, key: str, row: Row, reason: str) -> CorruptRowError:
        source = None
        with suppress(StoreError, *schema.DAMAGE):  # the record may be damaged too
            source = self.source(row)
        return CorruptRowError(
            f"{self._kind} row {key}{'' if source is None else f' of {source}'} is damaged "
            f"({reason}); encode it again with: wanlora inspect {self._cache} --repair; or delete "
            f"{self._cache / row.segment} and run: wanlora cache-latents --cache {self._cache}"
        )

    def source(self, row: Row) -> Any:
        """Read a row's source from its record: the clip's cut, or the prompt; None if absent.

        Raises:
            StoreError: The record cannot be read.
        """
        return _source_in(self._record(row.segment), row.row)

    def sources(self, keys: Iterable[str]) -> dict[str, Any]:
        """`source` of many rows, their records read at once. Raises the same."""
        listed = list(keys)

        def read(rows: Rows) -> dict[str, Any]:
            wanted = rows.by_segment(listed)
            return {
                key: _source_in(record, row)
                for record, found in zip(
                    self._records_of(list(wanted)), wanted.values(), strict=True
                )
                for key, row in found.items()
            }

        return self._follow(read)

    def latent_rgb(self) -> NormalEquations | None:
        """Sum of the normal equations of the first segments; None if they have none.

        Raises:
            StoreError: A record cannot be read.
        """
        return self._follow(lambda rows: latent_rgb_of(self._records_of(rows.segments[:PICTURED])))

    def _follow(self, work: Callable[[Rows], T]) -> T:
        """Call a function with records; if a segment is gone, list the store and call it again."""
        for _ in range(MOVES):
            rows = self.rows
            try:
                return work(rows)
            except _GoneError:
                if not self._look_again(rows):
                    raise
        return work(self.rows)

    def _record(self, segment: str) -> Mapping[str, Any]:
        return next(self._records_of([segment]))

    def _records_of(self, segments: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        unread = [segment for segment in segments if segment not in self._records]
        documents = storage.at(self._cache).get_many([f"{key}/{schema.GROUP}" for key in unread])
        for segment in segments:
            if segment in self._records:
                yield self._records[segment]
                continue
            document = next(documents)
            if document is None:
                raise _GoneError(f"{self._cache / segment} is gone")
            yield commit_records.parse_record(document, self._cache, segment, self._kind)


class _GoneError(CorruptRowError):
    """The commit record of a segment has been removed."""


def _source_in(record: Mapping[str, Any], row: int) -> Any:
    found = (record.get(layout.origins) for layout in schema.KINDS.values())
    origins: list[Any] = next(filter(None, found), [])
    return origins[row] if row < len(origins) else None


def latent_rgb_of(records: Iterable[Mapping[str, Any]]) -> NormalEquations | None:
    """Sum of the normal equations in commit records, or None if no record has any."""
    parts = [record["latent_rgb"] for record in records if "latent_rgb" in record]
    if not parts:
        return None
    return (
        np.sum([np.asarray(part["gram"], np.float64) for part in parts], axis=0),
        np.sum([np.asarray(part["cross"], np.float64) for part in parts], axis=0),
    )
