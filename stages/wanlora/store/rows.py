"""Table of the places of all rows of one kind, as columns: 80 bytes per row, for millions of rows.

Owns: the lookup of a place by key, and the table's file format. The table is immutable and opens
no files. Must not know: commit records, storage.
Legend: N rows, S segments.
"""

import io
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped, UInt32

VERSION = 1
COLUMNS = {
    "record_bytes": "record_bytes",
    "row_keys": "row_keys",
    "segment_indices": "homes",
    "places": "places",
    "crc32c": "crc32c",
}
"""Name of each column in the file, by attribute of `Rows`."""
DAMAGE = (
    zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, OSError, RuntimeError,
)  # fmt: skip
"""Errors that numpy raises for damaged files."""


@dataclass(frozen=True, slots=True)
class Row:
    """Place of one row, and its checksum."""

    segment: str
    row: int
    crc32c: int


@dataclass(frozen=True, eq=False)
class Rows(Mapping[str, Row]):
    """Rows by key, sorted. If two segments have the same row, the lowest segment id is used.

    Attributes:
        segments: Keys of the S segments' groups, in the order of their ids.
        record_bytes: Size of each segment's commit record, to notice a damaged one.
        row_keys: Key of each row, as bytes; repeated if two segments have the row.
        segment_indices: Segment of each row, an index into `segments`.
        places: Index of each row within its segment.
        crc32c: Checksum of each row.
    """

    segments: tuple[str, ...]
    record_bytes: UInt32[np.ndarray, " s"]
    row_keys: Shaped[np.ndarray, " n"]
    segment_indices: UInt32[np.ndarray, " n"]
    places: UInt32[np.ndarray, " n"]
    crc32c: UInt32[np.ndarray, " n"]

    def __getitem__(self, key: str) -> Row:
        at = int(self._find([key])[0])
        if at < 0:
            raise KeyError(key)
        return self.at(at)

    def __iter__(self) -> Iterator[str]:
        return (key.decode() for key in self.row_keys[self.firsts()].tolist())

    def __len__(self) -> int:
        return len(self.firsts())

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Keys that no segment has, in the given order."""
        return [keys[i] for i in np.flatnonzero(self._find(keys) < 0).tolist()]

    def present(self, keys: Iterable[str]) -> set[str]:
        """Keys that a segment has."""
        listed = list(keys)
        return {listed[i] for i in np.flatnonzero(self._find(listed) >= 0).tolist()}

    def repeats(self, keys: Iterable[str]) -> int:
        """Number of superfluous copies of these rows."""
        wanted = np.unique(_encoded(list(keys)))
        first = self.row_keys.searchsorted(wanted)
        copies = self.row_keys.searchsorted(wanted, side="right") - first
        return int(np.maximum(copies - 1, 0).sum())

    def copies(self, key: str) -> list[Row]:
        """Every copy of a row, lowest segment id first."""
        wanted = key.encode(errors="replace")
        first, end = (int(self.row_keys.searchsorted(wanted, side)) for side in ("left", "right"))
        return [self.at(i) for i in range(first, end)]

    def at(self, index: int) -> Row:
        """Place of the row at an index of the columns."""
        segment = self.segments[self.segment_indices[index]]
        return Row(segment, int(self.places[index]), int(self.crc32c[index]))

    def by_segment(self, keys: Iterable[str]) -> dict[str, dict[str, int]]:
        """Indices of the rows of these keys, by segment; keys that no segment has are left out.

        Searches for all keys at once, so that many segments can be read at once.
        """
        listed = list(dict.fromkeys(keys))
        found: dict[str, dict[str, int]] = {}
        for key, at in zip(listed, self._find(listed).tolist(), strict=True):
            if at >= 0:
                segment = self.segments[self.segment_indices[at]]
                found.setdefault(segment, {})[key] = int(self.places[at])
        return found

    def only(self, segments: Collection[str]) -> "Rows":
        """The rows of some segments."""
        kept = np.array([segment in segments for segment in self.segments], bool)
        if kept.all():
            return self
        stay = kept[self.segment_indices]
        return Rows(
            tuple(s for s in self.segments if s in segments),
            self.record_bytes[kept],
            self.row_keys[stay],
            (np.cumsum(kept) - 1).astype(np.uint32)[self.segment_indices[stay]],
            self.places[stay],
            self.crc32c[stay],
        )

    def firsts(self) -> Int64[np.ndarray, " k"]:
        """Index of the copy of each row that counts."""
        first = np.ones(len(self.row_keys), bool)
        first[1:] = self.row_keys[1:] != self.row_keys[:-1]
        return np.flatnonzero(first)

    def num_missing(self, keys: Shaped[np.ndarray, " m"]) -> int:
        """Number of keys that no segment has; the keys are sorted bytes without repeats."""
        return len(keys) - int(np.isin(keys, self.row_keys).sum())

    def _find(self, keys: Sequence[str]) -> Int64[np.ndarray, " m"]:
        """Index of each key's first row, -1 if there is no such row."""
        if not len(self.row_keys) or not keys:
            return np.full(len(keys), -1, np.int64)
        wanted = _encoded(keys)
        at = self.row_keys.searchsorted(wanted)
        there = self.row_keys[np.minimum(at, len(self.row_keys) - 1)] == wanted
        return np.where(there, at, -1)


def of_segment(
    segment: str, row_keys: Sequence[str], crc32c: Sequence[int], record_bytes: int
) -> Rows:
    """The rows of one segment."""
    keys = np.array([key.encode() for key in row_keys] or [b""])[: len(row_keys)]
    order = np.argsort(keys, kind="stable")
    return Rows(
        (segment,),
        np.array([record_bytes], np.uint32),
        keys[order],
        np.zeros(len(keys), np.uint32),
        order.astype(np.uint32),
        np.array(crc32c, np.uint32)[order],
    )


def join(tables: Sequence[Rows]) -> Rows:
    """All rows of several tables that have no segment in common."""
    named = sorted(
        ((segment, size) for rows in tables for segment, size in _sizes(rows)), key=_by_name
    )
    position = {segment: index for index, (segment, _) in enumerate(named)}
    segment_indices = _concatenate(
        [np.array([position[s] for s in t.segments], np.uint32)[t.segment_indices] for t in tables],
        np.uint32,
    )
    keys = _concatenate([t.row_keys for t in tables], np.dtype("S1"))
    order = np.lexsort((segment_indices, keys))
    return Rows(
        tuple(segment for segment, _ in named),
        np.array([size for _, size in named], np.uint32),
        keys[order],
        segment_indices[order],
        _concatenate([t.places for t in tables], np.uint32)[order],
        _concatenate([t.crc32c for t in tables], np.uint32)[order],
    )


def to_bytes(rows: Rows, owner: str) -> bytes:
    """Serialise as an ordinary .npz that includes the owner's name."""
    buffer = io.BytesIO()
    columns = {column: getattr(rows, name) for name, column in COLUMNS.items()}
    np.savez(
        buffer,
        owner=np.array(f"{VERSION} {owner}"),
        segments=np.array([segment.encode() for segment in rows.segments]),
        **columns,
    )
    return buffer.getvalue()


def from_bytes(data: bytes, owner: str) -> Rows | None:
    """Read what `to_bytes` wrote; None if it is damaged or has another version or owner."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            if str(found["owner"]) != f"{VERSION} {owner}":
                return None
            segments = tuple(segment.decode() for segment in found["segments"].tolist())
            return Rows(segments, **{name: found[column] for name, column in COLUMNS.items()})
    except DAMAGE:
        return None


def _encoded(keys: Sequence[str]) -> Shaped[np.ndarray, " m"]:
    """Keys as bytes; an impossible key matches no row."""
    encoded = [key.encode(errors="replace") for key in keys]
    return np.array(encoded) if encoded else np.zeros(0, "S1")


def _sizes(rows: Rows) -> Iterable[tuple[str, int]]:
    return zip(rows.segments, rows.record_bytes.tolist(), strict=True)


def _by_name(item: tuple[str, Any]) -> str:
    return item[0].rsplit("/", 1)[-1]


def _concatenate(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)
