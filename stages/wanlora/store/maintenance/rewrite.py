"""Write the rows to keep of some segments into new segments.

Owns: copying rows between segments. Must not know: why a row is kept.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.errors import CorruptRowError
from wanlora.store import commit_records, condemned, schema
from wanlora.store.commit_records import Segment
from wanlora.store.maintenance.remove import remove
from wanlora.store.row_reader import RowReader
from wanlora.store.writer import NormalEquations, SegmentWriter


@dataclass(frozen=True, slots=True)
class Limits:
    """Maximum number of rows and of raw bytes of a segment that is written again."""

    rows: int
    max_bytes: int


def keep_only(
    cache: Location,
    provenance: Mapping[str, Any],
    segments: Sequence[Segment],
    keep: Mapping[str, Collection[str]],
    limits: Limits,
) -> None:
    """Write the rows to keep of these segments again, then remove the segments.

    Args:
        cache: Cache folder or URL.
        provenance: Encoder that made all of the rows.
        segments: The segments.
        keep: Keys of the rows to keep, by key of the segment.
        limits: Limits of the new segments.

    Raises:
        CorruptRowError: A row to keep cannot be read; nothing has been removed.
        StoreError: The disk refuses, or a collection has begun.
    """
    stale = condemned.names(cache)
    write_again(cache, provenance, segments, keep, limits)
    remove(cache, [segment.key for segment in segments], (), spare=set, stale=stale)


def write_again(
    cache: Location,
    provenance: Mapping[str, Any],
    segments: Iterable[Segment],
    keep: Mapping[str, Collection[str]],
    limits: Limits,
) -> None:
    """Write the rows to keep of some segments into new ones; arguments as `keep_only`.

    The normal equations of latent_rgb are sums over a segment. New segments get a share of them in
    proportion to their rows.
    """
    with ExitStack() as stack:
        writers: dict[str, SegmentWriter] = {}
        for segment in segments:
            reader = RowReader.of_segments(cache, segment.kind, [segment])
            rgb = _share_of_rgb(segment, len(keep[segment.key]))
            for key in segment.row_keys:
                if key not in keep[segment.key]:
                    continue
                row = _read(cache, segment, reader, key)
                parent = segment.key.rpartition("/")[0]
                if parent not in writers:
                    writer = _writer(cache, segment.kind, provenance, row, limits)
                    writers[parent] = stack.enter_context(writer)
                source = reader.source(reader.rows[key])
                writers[parent].add(key, row, source=source, rgb=rgb)
                rgb = None


def records_of(
    cache: Location, kind: Kind, fingerprint: str, segments: Sequence[str]
) -> Iterator[Segment]:
    """Read commit records of segments, one after the other.

    Raises:
        CorruptRowError: A record is damaged.
        StoreError: A record is missing.
    """
    left = set(segments)
    for each in commit_records.read_records(cache, kind, fingerprint, segments):
        left.discard(each.key)
        if not isinstance(each, Segment):
            raise CorruptRowError(
                f"{each.message}; repair the cache with: wanlora inspect {cache} --repair"
            )
        yield each
    if left:
        raise condemned.collision(cache)


def _read(
    cache: Location, segment: Segment, reader: RowReader, key: str
) -> Float[np.ndarray, "..."]:
    try:
        return reader.read(key)
    except CorruptRowError as error:
        if not commit_records.is_committed(cache, segment.key):
            raise condemned.collision(cache) from error
        raise


def _writer(
    cache: Location,
    kind: Kind,
    provenance: Mapping[str, Any],
    row: Float[np.ndarray, "..."],
    limits: Limits,
) -> SegmentWriter:
    return SegmentWriter(
        cache,
        kind=kind,
        provenance=provenance,
        shape=schema.KINDS[kind].shape(row.shape),
        dtype=str(row.dtype),
        rows=limits.rows,
        max_bytes=limits.max_bytes,
        max_seconds=float("inf"),
    )


def _share_of_rgb(segment: Segment, kept: int) -> NormalEquations | None:
    whole = segment.record.get("latent_rgb")
    if whole is None:
        return None
    share = kept / len(segment.row_keys)
    return share * np.asarray(whole["gram"], float), share * np.asarray(whole["cross"], float)
