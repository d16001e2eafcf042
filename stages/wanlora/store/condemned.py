"""Segments that a collection or a repair is about to remove.

Owns: `CACHE/condemned/<id>.json`. Object stores have no locks, so each side publishes its own
intent and then reads the other's. A collection lists the segments it will remove, and only then
reads again which rows are wanted. A writer publishes what it wants (`store.wants`), and only then
reads these lists; it ignores the segments in them. In either order one of the two sees the other,
so a collection never removes a row that a writer needs.
"""

import json
import os
import secrets
import socket
from collections.abc import Collection

from wanlora.core.location import Location
from wanlora.errors import StoreError
from wanlora.store import schema, storage

FORMAT = "wanlora-condemned"
SUFFIX = ".json"


def publish(cache: Location, segments: Collection[str]) -> str:
    """Publish the keys of segments that will be removed; return the name of the list.

    Raises:
        StoreError: The disk is full, or the object store refuses.
    """
    name = secrets.token_hex(8)
    lists = {
        "format": FORMAT,
        "version": schema.VERSION,
        "segments": sorted(segments),
        "writer": {"host": socket.gethostname(), "pid": os.getpid()},
    }
    storage.at(cache).put(_key(name), json.dumps(lists, indent=1).encode())
    return name


def names(cache: Location) -> list[str]:
    """Names of all lists, from collections that are running or were killed."""
    found = storage.at(cache).files(schema.CONDEMNED)
    return [name.removesuffix(SUFFIX) for name in found if name.endswith(SUFFIX)]


def segments(cache: Location) -> frozenset[str]:
    """Read the keys of all condemned segments.

    Raises:
        StoreError: A list is damaged; names it.
        StoreVersionError: It has another version.
    """
    return frozenset().union(*(segments_in(cache, name) for name in names(cache)))


def segments_in(cache: Location, name: str) -> frozenset[str]:
    """Read the keys of one list; none if it has been withdrawn. Raises the same errors."""
    data = storage.at(cache).get(_key(name))
    return frozenset() if data is None else _parse(data, cache, _key(name))


def withdraw(cache: Location, which: Collection[str]) -> None:
    """Remove lists whose segments are gone, or will not be removed."""
    storage.at(cache).remove_many([_key(name) for name in which])


def collision(cache: Location) -> StoreError:
    """Build the error for two collections of one cache at the same time."""
    return StoreError(
        f"another wanlora inspect --gc or --repair has begun on {cache}; nothing was removed: run "
        "this again afterwards"
    )


def _parse(data: bytes, cache: Location, key: str) -> frozenset[str]:
    try:
        lists = json.loads(data)
        schema.check_version(lists, str(cache / key), name=FORMAT)
        return frozenset(str(segment) for segment in lists["segments"])
    except schema.DAMAGE as error:
        raise StoreError(
            f"{cache / key} is damaged ({type(error).__name__}: {error}); delete it once no "
            "wanlora inspect --gc or --repair runs on this cache"
        ) from error


def _key(name: str) -> str:
    return f"{schema.CONDEMNED}/{name}{SUFFIX}"
