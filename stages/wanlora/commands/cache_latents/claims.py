"""Chunks of rows for each of several processes that do not communicate.

Owns: the rows that are committed by now, and the next chunk of a rank. Ranks share only the store:
each may make any row that is not committed, so the other ranks take over the rows of one that died.
Near the end, two ranks may make the same row; such rows are counted.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from itertools import takewhile
from typing import Any, TypeVar

from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.processes.ranks import Rank, share
from wanlora.store import index
from wanlora.store.rows import Rows

T = TypeVar("T")

LISTING_REUSE = 20
"""Maximum age of a listing of the store, as a multiple of its duration. Listing then takes at most
5 % of the time, also on a remote store with a million rows."""


class CommittedRows:
    """Rows that are in the store now, of all writers.

    Args:
        cache: Cache folder or URL.
        kind: Kind of the rows.
        fingerprint: Fingerprint of their encoder.
    """

    def __init__(self, cache: Location, kind: Kind, fingerprint: str) -> None:
        self._where: tuple[Location, Kind, str] = (cache, kind, fingerprint)
        self._rows: Rows | None = None
        self._looked_s = self._cost_s = 0.0

    def __call__(self) -> Rows:
        """Return the rows of the last look; look again if it was long ago."""
        if self._rows is None or time.monotonic() - self._looked_s >= LISTING_REUSE * self._cost_s:
            return self.look()
        return self._rows

    def look(self) -> Rows:
        """Return the rows that are there now; reads only the new commit records."""
        started, first = time.monotonic(), self._rows is None
        # A damaged record is not counted; the check of the finished view names it.
        self._rows, _ = index.lasting(*self._where, known=self._rows)
        self._looked_s = time.monotonic()
        # The first look reads every record, the others only new ones.
        self._cost_s = 0.0 if first else self._looked_s - started
        return self._rows


def claim_chunks(
    missing: Mapping[str, T],
    rank: Rank,
    committed: Callable[[], Rows],
    *,
    max_rows: int,
    group_of: Callable[[T], Any],
    on_committed: Callable[[int], None],
    look: Callable[[], Rows] | None = None,
) -> Iterator[dict[str, T]]:
    """Yield chunks until every row has been yielded or is committed.

    Args:
        missing: The rows, by key, in an order that all ranks share.
        rank: This process among several.
        committed: Rows that need no more work.
        max_rows: Maximum number of rows in a chunk.
        group_of: Property that all rows of a chunk share, for example the bucket of a clip.
        on_committed: Called with the number of rows that others have committed since the last call.
        look: Returns the current `committed`, even if that is slow. Called before a rank that has
            finished its own share takes rows that probably belong to another rank.
    """
    left = dict(missing)
    made = part = 0
    while left:
        if made >= part:
            there = (look or committed)().present(left)
            made, part = 0, (len(left) - len(there)) // rank.world
        else:
            there = committed().present(left)
        for key in there:
            del left[key]
        on_committed(len(there))
        if not left:
            return
        keys = share(list(left), rank, most=max_rows)
        first = group_of(left[keys[0]])
        chunk = list(takewhile(lambda key: group_of(left[key]) == first, keys))  # noqa: B023
        made += len(chunk)
        yield {key: left.pop(key) for key in chunk}


def all_in_groups(
    missing: Mapping[str, T], *, group_of: Callable[[T], Any]
) -> Iterator[dict[str, T]]:
    """Yield all rows, one chunk per group, for a single process."""
    groups: dict[Any, dict[str, T]] = {}
    for key, row in missing.items():
        groups.setdefault(group_of(row), {})[key] = row
    yield from groups.values()
