"""Free the garbage of a store.

Owns: the order of a collection: rewrite, remove, delete the groups that are empty.
Must not know: how garbage is found.
"""

from collections.abc import Callable, Sequence

import numpy as np

from wanlora.core.location import Location
from wanlora.store import schema, storage
from wanlora.store.maintenance.garbage import Garbage
from wanlora.store.maintenance.generations import Generation, among
from wanlora.store.maintenance.remove import remove
from wanlora.store.maintenance.rewrite import Limits, records_of, write_again
from wanlora.store.wants import Named


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
        found: Generations from `generations`.
        garbage: Result of `find_garbage`.
        limits: Limits of the segments that are written again.
        named_now: Reads the keys to keep again, after the segments to remove are listed.

    Raises:
        CorruptRowError: A row to keep cannot be read; nothing has been removed.
        StoreError: The disk refuses, or another collection has begun.
    """
    for generation in found:
        mixed = [key for key in generation.rows.segments if key in garbage.rewritten]
        records = records_of(cache, generation.kind, generation.fingerprint, mixed)
        write_again(cache, generation.provenance, records, garbage.rewritten, limits)
    going = {*garbage.rewritten, *garbage.dropped}

    def newly_named() -> set[str]:
        named = named_now()
        return {segment for one in found for segment in _named_since(one, named)} & going

    remove(cache, going, garbage.leftovers, spare=newly_named, stale=garbage.stale)
    named = named_now() if garbage.emptied else {}
    for generation in found:
        if (
            generation.key in garbage.emptied
            and (generation.kind, generation.fingerprint) not in named
        ):
            _remove_groups(cache, generation)


def _named_since(generation: Generation, named: Named) -> list[str]:
    """Segments with rows that are referenced now, but were not when the generation was read."""
    now = named.get((generation.kind, generation.fingerprint))
    if now is None:
        return []
    keys, rows = generation.rows.row_keys, generation.rows
    new = among(keys, now) & ~among(keys, generation.wanted)
    return [rows.segments[index] for index in np.unique(rows.segment_indices[new]).tolist()]


def _remove_groups(cache: Location, generation: Generation) -> None:
    """Remove the documents of a generation without segments, and the snapshot of its records."""
    keys = storage.at(cache).listing(generation.key)
    if any(generation.segment_of(key) != key for key in keys):
        return  # a writer has begun
    storage.at(cache).remove_many(sorted(keys, key=len, reverse=True))
    storage.at(cache).remove_empty_folders(generation.key)
    storage.at(cache).remove(schema.snapshot_key(generation.kind, generation.fingerprint))
