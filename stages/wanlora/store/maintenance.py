"""Delete, compact and garbage-collect segments. Segments are never modified in place.

Owns: removal. Rows to keep are committed in another segment first, then the segments that go are
listed (`condemned`), and only then removed, their commit records first. So a reader finds every
kept row at every instant, a writer never counts on a row that goes, and a kill leaves at most a row
twice or a segment without a record, which the next collection frees.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from wanlora.core.buckets import MAX_TOKENS
from wanlora.core.location import Location
from wanlora.errors import CorruptRowError, StoreError
from wanlora.store import commit_records, condemned, index, schema, storage
from wanlora.store.commit_records import Segment
from wanlora.store.row_reader import RowReader
from wanlora.store.rows import Rows
from wanlora.store.schema import Kind
from wanlora.store.wants import Named
from wanlora.store.writer import NormalEquations, SegmentWriter

LITTER_AGE_S = 3600.0
"""Minimum age of half-written files and of segments without a commit record, whatever the settings:
a writer publishes a segment within minutes."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Maximum number of rows and of raw bytes of a segment that is written again."""

    rows: int
    max_bytes: int


@dataclass(frozen=True, eq=False)
class Generation:
    """All rows of one kind made by one encoder, and the keys to keep, as sorted bytes."""

    kind: Kind
    fingerprint: str
    provenance: Mapping[str, Any]
    rows: Rows
    wanted: Shaped[np.ndarray, " w"]

    @property
    def key(self) -> str:
        """Key of the group."""
        return schema.fingerprint_key(self.kind, self.fingerprint)


@dataclass(frozen=True, slots=True)
class Garbage:
    """What a collection frees.

    Attributes:
        rewritten: Keys of the rows to keep of each segment that also holds others, by segment.
        dropped: Segments of which no row is kept.
        litter: Keys of half-written files and of segments without a commit record.
        emptied: Keys of generations of which nothing is left.
        stale: Names of the lists of condemned segments that were there already.
        rows: Number of rows that nothing names.
        repeats: Number of rows that another segment has too.
        young: Number of rows that nothing names and that are spared because they are new.
        num_bytes: Bytes freed, less what is written again (estimated from the number of rows).
    """

    rewritten: Mapping[str, frozenset[str]]
    dropped: tuple[str, ...]
    litter: tuple[str, ...]
    emptied: tuple[str, ...]
    stale: tuple[str, ...]
    rows: int
    repeats: int
    young: int
    num_bytes: int


@dataclass(slots=True)
class _Sums:
    """Counts over all generations."""

    rows: int = 0
    repeats: int = 0
    young: int = 0
    num_bytes: int = 0


def generations(cache: Location, named: Named) -> list[Generation]:
    """All generations of a store.

    Args:
        cache: Cache folder or URL.
        named: Keys to keep (`wants.named_rows`).

    Raises:
        StoreError: A commit record is damaged.
    """
    nothing = np.zeros(0, "S1")
    return [
        Generation(
            kind,
            fingerprint,
            provenance,
            index.committed(cache, kind, fingerprint),
            named.get((kind, fingerprint), nothing),
        )
        for kind in schema.KINDS
        for fingerprint, provenance in index.provenances(cache, kind).items()
    ]


def find_garbage(
    cache: Location, found: Sequence[Generation], *, now: float, min_age_s: float
) -> Garbage:
    """Find the rows that nothing names, repeated rows, and what kills have left.

    Of a repeated row, the copy that stays is read first. A row of a segment that another collection
    has condemned is kept by writing it again.

    Args:
        cache: Cache folder or URL.
        found: From `generations`.
        now: Time by the clock that dates objects (`Storage.clock`).
        min_age_s: Unnamed rows younger than this are kept.

    Raises:
        StoreError: The disk or the object store refuses.
    """
    stale, doubtful = condemned.names(cache), condemned.segments(cache)
    sizes = storage.at(cache).listing(schema.STORE)
    partial = storage.at(cache).listing(storage.PARTIAL)
    rewritten: dict[str, frozenset[str]] = {}
    dropped: list[str] = []
    litter = [key for key, entry in partial.items() if now - entry.written >= LITTER_AGE_S]
    emptied: list[str] = []
    sums = _Sums(num_bytes=sum(partial[key].num_bytes for key in litter))
    for generation in found:
        inside = _inside(generation, sizes)
        ages = {key: now - entry.written for key, entry in inside.items()}
        keep = _kept(cache, generation, doubtful, ages, min_age_s, sums)
        parts = _by_segment(generation, inside)
        rewrite, drop = _divide(generation.rows, keep, doubtful, parts, sums)
        open_segments = _open_segments(generation, ages)
        empty = not rewrite and set(drop) == set(generation.rows.segments)
        if empty and not len(generation.wanted) and all(a >= min_age_s for a in ages.values()):
            emptied.append(generation.key)
            sums.num_bytes += sum(
                entry.num_bytes
                for key, entry in inside.items()
                if _segment_of(generation, key) == key
            )
        litter += open_segments
        sums.num_bytes += sum(parts[key] for key in open_segments)
        rewritten |= rewrite
        dropped += drop
    return Garbage(
        rewritten, tuple(dropped), tuple(litter), tuple(emptied), tuple(stale),
        sums.rows, sums.repeats, sums.young, sums.num_bytes,
    )  # fmt: skip


def collect(
    cache: Location,
    found: Sequence[Generation],
    garbage: Garbage,
    limits: Limits,
    *,
    named_now: Callable[[], Named],
) -> None:
    """Free what `find_garbage` found.

    Args:
        cache: Cache folder or URL.
        found: From `generations`.
        garbage: From `find_garbage`.
        limits: Limits of the segments that are written again.
        named_now: Reads the keys to keep again, once the segments that go are listed.

    Raises:
        CorruptRowError: A row to keep cannot be read; nothing has been removed.
        StoreError: The disk refuses, or another collection has begun.
    """
    for generation in found:
        mixed = [key for key in generation.rows.segments if key in garbage.rewritten]
        records = _records(cache, generation, mixed)
        _write_again(cache, generation, records, garbage.rewritten, limits)
    going = {*garbage.rewritten, *garbage.dropped}

    def newly_named() -> set[str]:
        named = named_now()
        return {segment for one in found for segment in _named_since(one, named)} & going

    _remove(cache, going, garbage.litter, spare=newly_named, stale=garbage.stale)
    named = named_now() if garbage.emptied else {}
    for generation in found:
        if (
            generation.key in garbage.emptied
            and (generation.kind, generation.fingerprint) not in named
        ):
            _remove_groups(cache, generation)


def keep_only(
    cache: Location,
    kind: Kind,
    fingerprint: str,
    provenance: Mapping[str, Any],
    segments: Sequence[Segment],
    keep: Mapping[str, Collection[str]],
    limits: Limits,
) -> None:
    """Write the rows to keep of these segments again, then remove the segments.

    Raises:
        CorruptRowError: A row to keep cannot be read; nothing has been removed.
        StoreError: The disk refuses, or a collection has begun.
    """
    stale = condemned.names(cache)
    nothing = np.zeros(0, "S1")
    generation = Generation(kind, fingerprint, provenance, index.rows_of(()), nothing)
    _write_again(cache, generation, segments, keep, limits)
    _remove(cache, [segment.key for segment in segments], (), spare=set, stale=stale)


def drop_segments(cache: Location, segments: Collection[str]) -> None:
    """Remove segments of which no row can be used.

    Raises:
        StoreError: The disk refuses, or a collection has begun.
    """
    _remove(cache, segments, (), spare=set, stale=condemned.names(cache))


def _remove(
    cache: Location,
    segments: Collection[str],
    litter: Collection[str],
    *,
    spare: Callable[[], Collection[str]],
    stale: Sequence[str],
) -> None:
    """List segments as condemned, look again what must stay, and remove the rest.

    Args:
        cache: Cache folder or URL.
        segments: Keys of segments; their rows to keep are committed elsewhere.
        litter: Keys of segments without a commit record, and of half-written files.
        spare: Returns segments that must stay after all.
        stale: Lists that were there when the rows to keep were chosen; none of those was relied on.

    Raises:
        StoreError: The disk refuses, or another collection has begun since.
    """
    if not segments and not litter and not stale:
        return
    own = condemned.publish(cache, {*segments, *litter})
    if set(condemned.names(cache)) - {own, *stale}:
        condemned.withdraw(cache, [own])
        raise _collision(cache)
    going = sorted(set(segments) - set(spare()))
    open_parts = [key for key in litter if not _is_committed(cache, key)]
    records = [f"{key}/{schema.GROUP}" for key in going]
    storage.at(cache).remove_many(records)
    _remove_trees(cache, [*going, *open_parts])
    # A writer that was stopped for long may have committed meanwhile; alive, it writes again.
    late = [key for key in open_parts if _is_committed(cache, key)]
    storage.at(cache).remove_many([f"{key}/{schema.GROUP}" for key in late])
    _remove_trees(cache, late)
    condemned.withdraw(cache, [own])
    # A list of a killed collection goes when its segments are gone. Until then it may be that of a
    # living one, which will still remove them.
    condemned.withdraw(cache, [name for name in stale if _is_done(cache, name)])


def _is_done(cache: Location, name: str) -> bool:
    return not any(storage.at(cache).listing(key) for key in condemned.segments_in(cache, name))


def _is_committed(cache: Location, segment: str) -> bool:
    in_store = segment.startswith(f"{schema.STORE}/")
    return in_store and storage.at(cache).get(f"{segment}/{schema.GROUP}") is not None


def _remove_trees(cache: Location, keys: Sequence[str]) -> None:
    files = [key for key in keys if not key.startswith(f"{schema.STORE}/")]
    storage.at(cache).remove_many(files)
    storage.at(cache).remove_trees([key for key in keys if key not in set(files)])


def _remove_groups(cache: Location, generation: Generation) -> None:
    """Remove the documents of a generation without segments, and what its records said."""
    keys = storage.at(cache).listing(generation.key)
    if any(_segment_of(generation, key) != key for key in keys):
        return  # a writer has begun
    storage.at(cache).remove_many(sorted(keys, key=len, reverse=True))
    storage.at(cache).remove_empty_folders(generation.key)
    storage.at(cache).remove(schema.snapshot_key(generation.kind, generation.fingerprint))


def _named_since(generation: Generation, named: Named) -> list[str]:
    """Segments with rows that are named now and were not when the generation was read."""
    now = named.get((generation.kind, generation.fingerprint))
    if now is None:
        return []
    keys, rows = generation.rows.row_keys, generation.rows
    new = _among(keys, now) & ~_among(keys, generation.wanted)
    return [rows.segments[home] for home in np.unique(rows.homes[new]).tolist()]


def _kept(
    cache: Location,
    generation: Generation,
    doubtful: Collection[str],
    ages: Mapping[str, float],
    min_age_s: float,
    sums: _Sums,
) -> Bool[np.ndarray, " n"]:
    """Choose the rows to keep: one readable copy of each row that is named or new."""
    rows = generation.rows
    if not len(rows.row_keys):
        return np.zeros(0, bool)
    records = [f"{segment}/{schema.GROUP}" for segment in rows.segments]
    fresh = np.array([ages.get(record, 0.0) < min_age_s for record in records], bool)
    condemned_too = np.array([segment in doubtful for segment in rows.segments], bool)
    named = _among(rows.row_keys, generation.wanted)
    order = np.lexsort((rows.homes, condemned_too[rows.homes], rows.row_keys))
    starts = _starts(rows.row_keys[order])
    ends = np.append(starts[1:], len(order))
    keep = np.zeros(len(order), bool)
    reader = RowReader(cache, generation.kind, rows)
    alive = named | fresh[rows.homes]
    lives = np.logical_or.reduceat(alive[order], starts)
    keep[order[starts[lives]]] = True
    for group in np.flatnonzero(lives & (ends - starts > 1)).tolist():
        copies = order[starts[group] : ends[group]]
        keep[copies] = _choose(reader, rows, copies.tolist(), cache, generation)
    is_named = np.logical_or.reduceat(named[order], starts)
    sums.rows += int(np.count_nonzero(~lives))
    sums.young += int(np.count_nonzero(lives & ~is_named))
    sums.repeats += int(np.count_nonzero(~keep) - np.count_nonzero(~lives))
    return keep


def _choose(
    reader: RowReader, rows: Rows, copies: Sequence[int], cache: Location, generation: Generation
) -> list[bool]:
    """Keep the first copy that reads as it was written, or all if none does."""
    for place in copies:
        row = rows.at(place)
        try:
            reader.read_at(rows.row_keys[place].decode(), row)
            list(_records(cache, generation, [row.segment]))
        except CorruptRowError:
            continue
        except StoreError:
            return [True] * len(copies)  # the disk or the network refuses: all may be whole
        return [copy == place for copy in copies]
    return [True] * len(copies)


def _divide(
    rows: Rows,
    keep: Bool[np.ndarray, " n"],
    doubtful: Collection[str],
    parts: Mapping[str, int],
    sums: _Sums,
) -> tuple[dict[str, frozenset[str]], list[str]]:
    """Sort segments into those to write again, with their rows, and those to drop."""
    num_segments = len(rows.segments)
    total = np.bincount(rows.homes, minlength=num_segments)
    kept = np.bincount(rows.homes[keep], minlength=num_segments)
    condemned_too = np.array([segment in doubtful for segment in rows.segments], bool)
    mixed = (kept > 0) & ((kept < total) | condemned_too)
    homes = {int(home): rows.segments[home] for home in np.flatnonzero(mixed).tolist()}
    staying: dict[str, set[str]] = {segment: set() for segment in homes.values()}
    for place in np.flatnonzero(keep & mixed[rows.homes]).tolist():
        staying[homes[int(rows.homes[place])]].add(rows.row_keys[place].decode())
    dropped = [rows.segments[home] for home in np.flatnonzero(kept == 0).tolist()]
    sums.num_bytes += sum(parts.get(segment, 0) for segment in dropped)
    for home, segment in homes.items():
        sums.num_bytes += int((1 - kept[home] / total[home]) * parts.get(segment, 0))
    return {segment: frozenset(keys) for segment, keys in staying.items()}, dropped


def _starts(keys: Shaped[np.ndarray, " n"]) -> Shaped[np.ndarray, " g"]:
    """Index of the first of each run of equal keys."""
    first = np.ones(len(keys), bool)
    first[1:] = keys[1:] != keys[:-1]
    return np.flatnonzero(first)


def _among(
    keys: Shaped[np.ndarray, " n"], wanted: Shaped[np.ndarray, " w"]
) -> Bool[np.ndarray, " n"]:
    """Membership of keys in sorted ones."""
    if not len(wanted):
        return np.zeros(len(keys), bool)
    at = np.minimum(wanted.searchsorted(keys), len(wanted) - 1)
    found: np.ndarray = wanted[at] == keys
    return found


def _records(cache: Location, generation: Generation, segments: Sequence[str]) -> Iterator[Segment]:
    """Read commit records of segments, one after the other.

    Raises:
        CorruptRowError: One is damaged.
        StoreError: One is gone.
    """
    left = set(segments)
    for each in commit_records.read_records(
        cache, generation.kind, generation.fingerprint, segments
    ):
        left.discard(each.key)
        if not isinstance(each, Segment):
            raise CorruptRowError(
                f"{each.message}; repair the cache with: wanlora inspect {cache} --repair"
            )
        yield each
    if left:
        raise _collision(cache)


def _collision(cache: Location) -> StoreError:
    return StoreError(
        f"another wanlora inspect --gc or --repair has begun on {cache}; nothing was removed: run "
        "this again afterwards"
    )


def _write_again(
    cache: Location,
    generation: Generation,
    segments: Iterable[Segment],
    keep: Mapping[str, Collection[str]],
    limits: Limits,
) -> None:
    """Write the rows to keep of some segments into new ones.

    The normal equations of latent_rgb are a segment's sum; they go on in proportion to its rows.
    """
    with ExitStack() as stack:
        writers: dict[str, SegmentWriter] = {}
        for segment in segments:
            reader = RowReader.of_segments(cache, generation.kind, [segment])
            rgb = _share_of_rgb(segment, len(keep[segment.key]))
            for key in segment.row_keys:
                if key not in keep[segment.key]:
                    continue
                row = _read(cache, segment, reader, key)
                parent = segment.key.rpartition("/")[0]
                if parent not in writers:
                    writers[parent] = stack.enter_context(_writer(cache, generation, row, limits))
                writers[parent].add(
                    key,
                    row,
                    source=reader.source(reader.rows[key]),
                    rgb=rgb,
                )
                rgb = None


def _read(
    cache: Location, segment: Segment, reader: RowReader, key: str
) -> Float[np.ndarray, "..."]:
    try:
        return reader.read(key)
    except CorruptRowError as error:
        if not _is_committed(cache, segment.key):
            raise _collision(cache) from error
        raise


def _writer(
    cache: Location, generation: Generation, row: Float[np.ndarray, "..."], limits: Limits
) -> SegmentWriter:
    shape = row.shape if generation.kind == "latents" else (MAX_TOKENS, row.shape[1])
    return SegmentWriter(
        cache,
        kind=generation.kind,
        provenance=generation.provenance,
        shape=shape,
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


def _inside(generation: Generation, sizes: Mapping[str, storage.Entry]) -> dict[str, storage.Entry]:
    top = f"{generation.key}/"
    return {key: entry for key, entry in sizes.items() if key.startswith(top)}


def _segment_of(generation: Generation, key: str) -> str:
    """Key of the segment that an object belongs to; of a group's document, the object's own key."""
    depth = generation.key.count("/") + (3 if generation.kind == "latents" else 2)
    parts = key.split("/")
    return "/".join(parts[:depth])


def _by_segment(generation: Generation, inside: Mapping[str, storage.Entry]) -> dict[str, int]:
    """Bytes of each segment, committed or not."""
    totals: dict[str, int] = {}
    for key, entry in inside.items():
        if (segment := _segment_of(generation, key)) != key:
            totals[segment] = totals.get(segment, 0) + entry.num_bytes
    return totals


def _open_segments(generation: Generation, ages: Mapping[str, float]) -> list[str]:
    """Segments without a commit record, of which every part is old."""
    youngest: dict[str, float] = {}
    for key, age in ages.items():
        if (segment := _segment_of(generation, key)) != key:
            youngest[segment] = min(youngest.get(segment, age), age)
    return [
        segment
        for segment, age in youngest.items()
        if f"{segment}/{schema.GROUP}" not in ages and age >= LITTER_AGE_S
    ]
