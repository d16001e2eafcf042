"""Find the objects that a collection may free.

Owns: the search for unreferenced rows, repeated rows, and files of killed processes.
Must not know: how anything is removed.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped

from wanlora.core.location import Location
from wanlora.errors import CorruptRowError, StoreError
from wanlora.store import condemned, schema, storage
from wanlora.store.maintenance.generations import Generation, among
from wanlora.store.maintenance.rewrite import records_of
from wanlora.store.row_reader import RowReader
from wanlora.store.rows import Rows

LITTER_AGE_S = 3600.0
"""Minimum age of half-written files and of segments without a commit record, with any settings: a
writer publishes a segment within minutes."""


@dataclass(frozen=True, slots=True)
class Garbage:
    """Result of the search: the garbage of a cache.

    Attributes:
        rewritten: Keys of the rows to keep, by segment that also holds other rows.
        dropped: Segments without a row to keep.
        leftovers: Keys of half-written files and of segments without a commit record.
        emptied: Keys of generations that will be empty.
        stale: Names of lists of condemned segments that existed before.
        rows: Number of unreferenced rows.
        repeats: Number of rows that another segment also has.
        young: Number of unreferenced rows that are kept because they are new.
        num_bytes: Bytes freed minus bytes rewritten (estimated from the number of rows).
    """

    rewritten: Mapping[str, frozenset[str]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = ()
    emptied: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()
    rows: int = 0
    repeats: int = 0
    young: int = 0
    num_bytes: int = 0


class _Counts(NamedTuple):
    """Numbers of rows, as in `Garbage`."""

    rows: int = 0
    repeats: int = 0
    young: int = 0


def find_garbage(
    cache: Location, found: Sequence[Generation], *, now: float, min_age_s: float
) -> Garbage:
    """Find unreferenced rows, repeated rows, and files of killed processes.

    If a row is repeated, the copy to keep is read first. A row in a segment that another collection
    has condemned is kept by writing it again.

    Args:
        cache: Cache folder or URL.
        found: Generations from `generations`.
        now: Time on the clock that dates objects (`Storage.clock`).
        min_age_s: Minimum age of unreferenced rows; younger ones are kept.

    Raises:
        StoreError: The disk or the object store refuses.
    """
    stale, doubtful = condemned.names(cache), condemned.segments(cache)
    objects = storage.at(cache).listing(schema.STORE)
    partial = storage.at(cache).listing(storage.PARTIAL)
    old = [key for key, entry in partial.items() if now - entry.written >= LITTER_AGE_S]
    half_written = Garbage(
        leftovers=tuple(old),
        stale=tuple(stale),
        num_bytes=sum(partial[key].num_bytes for key in old),
    )
    parts = [half_written]
    for generation in found:
        inside = {
            key: entry for key, entry in objects.items() if key.startswith(f"{generation.key}/")
        }
        ages = {key: now - entry.written for key, entry in inside.items()}
        num_bytes = {key: entry.num_bytes for key, entry in inside.items()}
        parts.append(_garbage_in(cache, generation, ages, num_bytes, doubtful, min_age_s))
    return _merged(parts)


def _garbage_in(
    cache: Location,
    generation: Generation,
    ages: Mapping[str, float],
    num_bytes: Mapping[str, int],
    doubtful: Collection[str],
    min_age_s: float,
) -> Garbage:
    """Find the garbage of one generation.

    Args:
        cache: Cache folder or URL.
        generation: The generation.
        ages: Seconds since each of its objects was written.
        num_bytes: Bytes of each of its objects.
        doubtful: Segments that another collection has condemned.
        min_age_s: Minimum age of unreferenced rows; younger ones are kept.
    """
    keep, counts = _kept(cache, generation, doubtful, ages, min_age_s)
    sizes = _by_segment(generation, num_bytes)
    rewritten, dropped, freed = _divide(generation.rows, keep, doubtful, sizes)
    open_segments = _open_segments(generation, ages)
    freed += sum(sizes[key] for key in open_segments)
    is_empty = not rewritten and set(dropped) == set(generation.rows.segments)
    is_old = all(age >= min_age_s for age in ages.values())
    is_emptied = is_empty and is_old and not len(generation.wanted)
    if is_emptied:
        freed += sum(size for key, size in num_bytes.items() if generation.segment_of(key) == key)
    return Garbage(
        rewritten=rewritten,
        dropped=tuple(dropped),
        leftovers=tuple(open_segments),
        emptied=(generation.key,) if is_emptied else (),
        num_bytes=freed,
        **counts._asdict(),
    )


def _merged(parts: Sequence[Garbage]) -> Garbage:
    return Garbage(
        rewritten={key: rows for part in parts for key, rows in part.rewritten.items()},
        dropped=tuple(key for part in parts for key in part.dropped),
        leftovers=tuple(key for part in parts for key in part.leftovers),
        emptied=tuple(key for part in parts for key in part.emptied),
        stale=tuple(name for part in parts for name in part.stale),
        rows=sum(part.rows for part in parts),
        repeats=sum(part.repeats for part in parts),
        young=sum(part.young for part in parts),
        num_bytes=sum(part.num_bytes for part in parts),
    )


def _kept(
    cache: Location,
    generation: Generation,
    doubtful: Collection[str],
    ages: Mapping[str, float],
    min_age_s: float,
) -> tuple[Bool[np.ndarray, " n"], _Counts]:
    """Choose the rows to keep: one readable copy of each row that is referenced or new.

    Returns:
        True for each row that is kept, and the numbers of the other rows.
    """
    rows = generation.rows
    if not len(rows.row_keys):
        return np.zeros(0, bool), _Counts()
    records = [f"{segment}/{schema.GROUP}" for segment in rows.segments]
    fresh = np.array([ages.get(record, 0.0) < min_age_s for record in records], bool)
    condemned_too = np.array([segment in doubtful for segment in rows.segments], bool)
    named = among(rows.row_keys, generation.wanted)
    order = np.lexsort((rows.segment_indices, condemned_too[rows.segment_indices], rows.row_keys))
    starts = _starts(rows.row_keys[order])
    ends = np.append(starts[1:], len(order))
    keep = np.zeros(len(order), bool)
    reader = RowReader(cache, generation.kind, rows)
    alive = named | fresh[rows.segment_indices]
    lives = np.logical_or.reduceat(alive[order], starts)
    keep[order[starts[lives]]] = True
    for group in np.flatnonzero(lives & (ends - starts > 1)).tolist():
        copies = order[starts[group] : ends[group]]
        keep[copies] = _choose(reader, copies.tolist(), cache, generation)
    is_named = np.logical_or.reduceat(named[order], starts)
    num_dead = int(np.count_nonzero(~lives))
    return keep, _Counts(
        rows=num_dead,
        repeats=int(np.count_nonzero(~keep)) - num_dead,
        young=int(np.count_nonzero(lives & ~is_named)),
    )


def _choose(
    reader: RowReader, copies: Sequence[int], cache: Location, generation: Generation
) -> list[bool]:
    """Keep the first copy that is readable and unchanged, or all copies if none is."""
    rows = generation.rows
    for place in copies:
        row = rows.at(place)
        try:
            reader.read_at(rows.row_keys[place].decode(), row)
            list(records_of(cache, generation.kind, generation.fingerprint, [row.segment]))
        except CorruptRowError:  # another copy may be intact
            continue
        except StoreError:
            return [True] * len(copies)  # the disk or the network failed: every copy may be intact
        return [copy == place for copy in copies]
    return [True] * len(copies)


def _divide(
    rows: Rows,
    keep: Bool[np.ndarray, " n"],
    doubtful: Collection[str],
    sizes: Mapping[str, int],
) -> tuple[dict[str, frozenset[str]], list[str], int]:
    """Sort segments into those to write again, with their rows, and those to drop.

    Returns:
        Both, and the number of bytes freed.
    """
    num_segments = len(rows.segments)
    total = np.bincount(rows.segment_indices, minlength=num_segments)
    kept = np.bincount(rows.segment_indices[keep], minlength=num_segments)
    condemned_too = np.array([segment in doubtful for segment in rows.segments], bool)
    mixed = (kept > 0) & ((kept < total) | condemned_too)
    names = {index: rows.segments[index] for index in np.flatnonzero(mixed).tolist()}
    staying: dict[str, set[str]] = {segment: set() for segment in names.values()}
    for place in np.flatnonzero(keep & mixed[rows.segment_indices]).tolist():
        staying[names[int(rows.segment_indices[place])]].add(rows.row_keys[place].decode())
    dropped = [rows.segments[index] for index in np.flatnonzero(kept == 0).tolist()]
    freed = sum(sizes.get(segment, 0) for segment in dropped)
    for index, segment in names.items():
        freed += int((1 - kept[index] / total[index]) * sizes.get(segment, 0))
    return {segment: frozenset(keys) for segment, keys in staying.items()}, dropped, freed


def _starts(keys: Shaped[np.ndarray, " n"]) -> Shaped[np.ndarray, " g"]:
    """Index of the first of each run of equal keys."""
    first = np.ones(len(keys), bool)
    first[1:] = keys[1:] != keys[:-1]
    return np.flatnonzero(first)


def _by_segment(generation: Generation, num_bytes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of each segment, committed or not."""
    totals: dict[str, int] = {}
    for key, size in num_bytes.items():
        if (segment := generation.segment_of(key)) != key:
            totals[segment] = totals.get(segment, 0) + size
    return totals


def _open_segments(generation: Generation, ages: Mapping[str, float]) -> list[str]:
    """Segments without a commit record whose parts are all old."""
    youngest: dict[str, float] = {}
    for key, age in ages.items():
        if (segment := generation.segment_of(key)) != key:
            youngest[segment] = min(youngest.get(segment, age), age)
    return [
        segment
        for segment, age in youngest.items()
        if f"{segment}/{schema.GROUP}" not in ages and age >= LITTER_AGE_S
    ]
