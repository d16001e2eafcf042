"""A local copy of a store that is far away, filled as it is read.

Owns: fetching whole segments, once, whatever the number of threads and of processes that share the
folder. A copy has the store's own layout and is published in the store's own order, so what a kill
leaves is no segment. It may be deleted at any time.
"""

import threading
from collections import defaultdict
from pathlib import Path

from wanlora.core.location import Location
from wanlora.errors import CorruptRowError
from wanlora.store import objects, schema

FLAG = "--local-copy"
"""Option that names the folder."""


class LocalCopy:
    """Segments of a store in a folder.

    Args:
        origin: The cache to copy from.
        folder: Where to; made when it is not there.
    """

    def __init__(self, origin: Location, folder: Path) -> None:
        self._origin = origin
        self._folder = folder
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()

    def fetch(self, segment: str) -> Path:
        """Copy a segment unless it is there; return the folder to read it from.

        Raises:
            CorruptRowError: The store has lost the segment.
            StoreError: The store or the disk refuses.
        """
        with self._lock:
            lock = self._locks[segment]
        commit = f"{segment}/{schema.GROUP}"
        with lock:
            if objects.get(self._folder, commit) is None:
                with objects.locked(self._folder, segment, flag=FLAG):
                    self._fetch(segment, commit)
        return self._folder

    def _fetch(self, segment: str, commit: str) -> None:
        if objects.get(self._folder, commit) is not None:  # another process has, meanwhile
            return
        keys = sorted(objects.listing(self._origin, segment))
        if commit not in keys:
            raise CorruptRowError(f"{self._origin / segment} is gone; start again")
        keys.remove(commit)
        for key, data in zip(keys, objects.get_many(self._origin, keys), strict=True):
            objects.put(self._folder, key, data or b"", flag=FLAG)
        record = objects.get(self._origin, commit) or b""
        objects.put(self._folder, commit, record, flag=FLAG)

    def forget(self, segment: str) -> None:
        """Remove the copy of a segment, its commit record first."""
        with objects.locked(self._folder, segment, flag=FLAG):  # nobody is filling it meanwhile
            objects.remove(self._folder, f"{segment}/{schema.GROUP}")
            objects.remove_tree(self._folder, segment)
