"""Storage of a cache: objects under keys, in a folder or in an object store.

Owns: the guarantees of both. A key has `/` between names. An object is complete or absent, even
after a crash or a power cut. Must not know: Zarr arrays, segments, views.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from wanlora.core.location import Location, Url

PARTIAL = ".partial"
"""Folder of half-written files, beside the store and the views: readers never look into it."""


class Entry(NamedTuple):
    """Size of an object, and when it was written (seconds since 1970)."""

    num_bytes: int
    written: float


@runtime_checkable
class Storage(Protocol):
    """Objects under keys. Every method raises StoreError if the disk or the server refuses."""

    def put(self, key: str, data: bytes) -> None:
        """Write an object atomically; a finished write survives a power cut."""

    def get(self, key: str) -> bytes | None:
        """Read an object, or return None if it does not exist."""

    def get_many(self, keys: Sequence[str]) -> Iterator[bytes | None]:
        """Read objects in order, with many requests at once if each is a round trip."""

    def folders(self, key: str) -> list[str]:
        """Names of the folders directly under a key, sorted; none if it does not exist."""

    def files(self, key: str) -> list[str]:
        """Names of the objects directly under a key, sorted; none if it does not exist."""

    def sizes_in_folders(self, key: str, name: str) -> dict[str, int]:
        """Bytes of the object with this name in each folder directly under a key."""

    def listing(self, key: str) -> dict[str, Entry]:
        """Every object under a key, by its key."""

    def remove(self, key: str) -> None:
        """Remove an object; one that does not exist is ignored."""

    def remove_many(self, keys: Collection[str]) -> None:
        """Remove objects, with few requests."""

    def remove_tree(self, key: str) -> None:
        """Remove every object under a key."""

    def remove_trees(self, keys: Collection[str]) -> None:
        """Remove every object under each key."""

    def remove_empty_folders(self, key: str) -> None:
        """Remove a folder and its subfolders if they are empty; an object store has no folders."""

    def clock(self) -> float:
        """Read the clock that dates objects, in seconds since 1970; writes and removes an object.

        The age of an object can only be computed with the server's own clock.
        """

    def zarr_store(self) -> Any:
        """Open a read-only zarr store with the same keys."""


def at(location: Location) -> Storage:
    """Return the storage at a path or URL. Opens nothing yet."""
    # Each is imported when it is used, because both build on this module.
    if isinstance(location, Url):
        from wanlora.store.bucket import Bucket  # noqa: PLC0415

        return Bucket(location)
    from wanlora.store.folder import Folder  # noqa: PLC0415

    return Folder(location)


def num_bytes(location: Location, key: str) -> int:
    """Sum of the sizes of all objects under a key, in bytes."""
    return sum(entry.num_bytes for entry in at(location).listing(key).values())
