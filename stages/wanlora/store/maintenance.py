"""Take rows out of a store that is never rewritten in place: drop, compact, collect.

Owns: removal, always the commit record first, and always after what is worth keeping stands in
another segment. So a reader sees every kept row at every instant, and a kill leaves at most a row
twice or a segment without a record, which the next collection frees. Not for a store that a run is
reading: what it has opened would vanish under it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from wanlora.core.buckets import MAX_TOKENS
from wanlora.core.location import Location
from wanlora.store import index, objects, schema
from wanlora.store.index import Segment
from wanlora.store.reader import RowReader
from wanlora.store.schema import Kind
from wanlora.store.views import View
from wanlora.store.writer import NormalEquations, SegmentWriter


@dataclass(frozen=True, slots=True)
class Limits:
    """Most rows and raw bytes in a segment that is written anew."""

    rows: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Generation:
    """Everything of one kind made by one encoder, and what the views want of it."""

    kind: Kind
    fingerprint: str
    provenance: Mapping[str, Any]
    segments: Sequence[Segment]
    wanted: frozenset[str]

    @property
    def key(self) -> str:
        """Key of the group."""
        return schema.fingerprint_key(self.kind, self.fingerprint)


@dataclass(frozen=True, slots=True)
class Garbage:
    """What a collection frees.

    Attributes:
        rewritten: Rows to keep of each segment that holds others too, by the segment's key.
        dropped: Segments of which nothing is kept.
        litter: Keys of half-written files, segments without a commit record, empty generations.
        rows: Rows that no view names.
        repeats: Rows that another segment has too.
        young: Rows that no view names and that are spared because they are new.
        num_bytes: Of everything that goes, less what is written anew (estimated by rows).
    """

    rewritten: Mapping[str, frozenset[str]]
    dropped: tuple[str, ...]
    litter: tuple[str, ...]
    rows: int
    repeats: int
    young: int
    num_bytes: int


def generations(cache: Location, views: Iterable[View]) -> list[Generation]:
    """All generations of a store.

    Raises:
        StoreError: A commit record is damaged.
    """
    wanted: dict[tuple[Kind, str], set[str]] = {}
    for view in views:
        wanted.setdefault(("latents", view.latents), set()).update(c.key for c in view.clips)
        wanted.setdefault(("text", view.text), set()).update(view.prompt_keys())
    return [
        Generation(
            kind,
            fingerprint,
            provenance,
            index.segments_of(cache, kind, fingerprint),
            frozenset(wanted.get((kind, fingerprint), ())),
        )
        for kind in schema.KINDS
        for fingerprint, provenance in index.provenances(cache, kind).items()
    ]


def find_garbage(
    cache: Location, found: Sequence[Generation], *, now: float, min_age_s: float
) -> Garbage:
    """Tell what no view names.

    Args:
        cache: Cache folder or URL.
        found: From `generations`.
        now: Seconds since 1970.
        min_age_s: Rows and litter younger than this are left alone.
    """
    rewritten: dict[str, frozenset[str]] = {}
    dropped: list[str] = []
    rows = repeats = young = num_bytes = 0
    sizes = objects.listing(cache, schema.STORE)
    partial = objects.listing(cache, objects.PARTIAL)
    weights = _by_folder(sizes | partial)
    for generation in found:
        homes = index.rows_of(generation.segments)
        for segment in generation.segments:
            fresh = now - float(segment.record.get("writer", {}).get("time", 0)) < min_age_s
            here = {key for key in segment.row_keys if homes[key].segment == segment.key}
            dead = here - generation.wanted
            if fresh:
                young += len(dead)
                dead = set()
            keep = here - dead
            rows += len(dead)
            repeats += len(segment.row_keys) - len(here)
            if len(keep) == len(segment.row_keys):
                continue
            if keep:
                share = 1 - len(keep) / len(segment.row_keys)
                num_bytes += int(share * weights.get(segment.key, 0))
                rewritten[segment.key] = frozenset(keep)
            else:
                dropped.append(segment.key)
    litter = _litter(found, sizes, partial, dropped, now=now, min_age_s=min_age_s)
    num_bytes += sum(weights.get(key, 0) for key in _outermost({*dropped, *litter}))
    return Garbage(
        rewritten, tuple(dropped), tuple(litter), rows, repeats, young, num_bytes
    )  # fmt: skip


def collect(cache: Location, found: Sequence[Generation], garbage: Garbage, limits: Limits) -> None:
    """Free what `find_garbage` found.

    Raises:
        CorruptRowError: A row to keep cannot be read; nothing of it has been removed.
        StoreError: The disk refuses.
    """
    for generation in found:
        mixed = [s for s in generation.segments if s.key in garbage.rewritten]
        keep_only(cache, generation, mixed, garbage.rewritten, limits)
    for key in (*garbage.dropped, *garbage.litter):
        drop(cache, key)


def keep_only(
    cache: Location,
    generation: Generation,
    segments: Sequence[Segment],
    keep: Mapping[str, Collection[str]],
    limits: Limits,
) -> None:
    """Write the rows to keep of these segments anew, then drop the segments.

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
                row = reader.read(key)
                parent = segment.key.rpartition("/")[0]
                if parent not in writers:
                    writers[parent] = stack.enter_context(_writer(cache, generation, row, limits))
                writers[parent].add(
                    key,
                    row,
                    source=reader.source(reader.rows[key]),
                    rgb=rgb,
                    logvar=reader.read_logvar(key) if generation.kind == "latents" else None,
                )
                rgb = None
    for segment in segments:
        drop(cache, segment.key)


def drop(cache: Location, segment: str) -> None:
    """Remove a segment or a generation, its record first; or a half-written file."""
    if segment.startswith(f"{objects.PARTIAL}/"):
        objects.remove(cache, segment)
        return
    objects.remove(cache, f"{segment}/{schema.GROUP}")
    objects.remove_tree(cache, segment)
    _, *rest = segment.split("/")
    if len(rest) == 2:  # a generation: nobody will ask again what its records said
        kind, fingerprint = rest
        objects.remove(cache, schema.snapshot_key(kind, fingerprint))


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


def _by_folder(sizes: Mapping[str, objects.Entry]) -> dict[str, int]:
    """Bytes under each folder, however deep."""
    totals: dict[str, int] = {}
    for key, entry in sizes.items():
        parts = key.split("/")
        for depth in range(1, len(parts) + 1):
            folder = "/".join(parts[:depth])
            totals[folder] = totals.get(folder, 0) + entry.num_bytes
    return totals


def _outermost(keys: Collection[str]) -> list[str]:
    """The keys that lie under no other: what goes with its generation is counted once."""
    return [key for key in keys if not any(above in keys for above in _above(key))]


def _above(key: str) -> Iterable[str]:
    parts = key.split("/")
    return ("/".join(parts[:depth]) for depth in range(1, len(parts)))


def _litter(
    found: Sequence[Generation],
    sizes: Mapping[str, objects.Entry],
    partial: Mapping[str, objects.Entry],
    dropped: Collection[str],
    *,
    now: float,
    min_age_s: float,
) -> list[str]:
    """Half-written files, segments without a commit record, generations of which nothing stays."""
    litter = [key for key, entry in partial.items() if now - entry.written >= min_age_s]
    for generation in found:
        gone = {segment.key for segment in generation.segments} <= set(dropped)
        depth = generation.key.count("/") + (3 if generation.kind == "latents" else 2)
        newest: dict[str, float] = {}
        for key, entry in sizes.items():
            if key.startswith(f"{generation.key}/") and key.count("/") >= depth:
                segment = "/".join(key.split("/")[:depth])
                newest[segment] = max(newest.get(segment, 0.0), entry.written)
        open_segments = [key for key in newest if f"{key}/{schema.GROUP}" not in sizes]
        if gone and not generation.wanted and _oldest_only(sizes, generation, now - min_age_s):
            litter.append(generation.key)
        else:
            litter += [key for key in open_segments if now - newest[key] >= min_age_s]
    return litter


def _oldest_only(sizes: Mapping[str, objects.Entry], generation: Generation, before: float) -> bool:
    """Whether nobody has written to a generation since."""
    return all(
        entry.written <= before
        for key, entry in sizes.items()
        if key.startswith(f"{generation.key}/")
    )
