"""Remove segments that are listed as condemned.

Owns: the order of a removal: list, look again, remove the commit records, remove the rest.
Must not know: why a segment is removed.
"""

from collections.abc import Callable, Collection, Sequence

from wanlora.core.location import Location
from wanlora.store import commit_records, condemned, schema, storage


def drop_segments(cache: Location, segments: Collection[str]) -> None:
    """Remove segments without a usable row.

    Raises:
        StoreError: The disk refuses, or a collection has begun.
    """
    remove(cache, segments, (), spare=set, stale=condemned.names(cache))


def remove(
    cache: Location,
    segments: Collection[str],
    leftovers: Collection[str],
    *,
    spare: Callable[[], Collection[str]],
    stale: Sequence[str],
) -> None:
    """List segments as condemned, check again which must stay, and remove the others.

    Args:
        cache: Cache folder or URL.
        segments: Keys of segments; their rows to keep are committed elsewhere.
        leftovers: Keys of segments without a commit record, and of half-written files.
        spare: Returns the segments that must stay.
        stale: Lists that existed when the rows to keep were chosen; no kept row depends on them.

    Raises:
        StoreError: The disk refuses, or another collection has begun since.
    """
    if not segments and not leftovers and not stale:
        return
    own = condemned.publish(cache, {*segments, *leftovers})
    if set(condemned.names(cache)) - {own, *stale}:
        condemned.withdraw(cache, [own])
        raise condemned.collision(cache)
    going = sorted(set(segments) - set(spare()))
    open_parts = [key for key in leftovers if not commit_records.is_committed(cache, key)]
    records = [f"{key}/{schema.GROUP}" for key in going]
    storage.at(cache).remove_many(records)
    _remove_trees(cache, [*going, *open_parts])
    # A writer that was paused for long may have committed meanwhile; if it runs, it writes again.
    late = [key for key in open_parts if commit_records.is_committed(cache, key)]
    storage.at(cache).remove_many([f"{key}/{schema.GROUP}" for key in late])
    _remove_trees(cache, late)
    condemned.withdraw(cache, [own])
    # The list of a killed collection is removed after its last segment. Until then, the collection
    # may still be running and remove segments.
    condemned.withdraw(cache, [name for name in stale if _is_done(cache, name)])


def _is_done(cache: Location, name: str) -> bool:
    return not any(storage.at(cache).listing(key) for key in condemned.segments_in(cache, name))


def _remove_trees(cache: Location, keys: Sequence[str]) -> None:
    files = [key for key in keys if not key.startswith(f"{schema.STORE}/")]
    storage.at(cache).remove_many(files)
    storage.at(cache).remove_trees([key for key in keys if key not in set(files)])
