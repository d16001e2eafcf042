"""Chunks of rows for each of several processes that do not communicate.

Owns: the rows that are committed by now, and the next chunk of a rank. Ranks share only the store:
each may make any row that is not committed, so the living take over the rows of the dead. The cost:
two ranks may make the same row when few are left; such rows are counted.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from itertools import takewhile
from typing import Any, TypeVar

from wanlora.core.location import Location
from wanlora.processes.ranks import Rank, share
from wanlora.store import index
from wanlora.store.rows import Rows
from wanlora.store.schema import Kind

T = TypeVar("T")

PATIENCE = 20
"""A listing of the store is used again until it is this many times as old as it took: listing takes
at most 5 % of the time, on a remote store with a million rows too."""


class Committed:
    """Rows in the store by now, whoever wrote them.

    Args:
        cache: Cache folder or URL.
        kind: Kind of the rows.
        fingerprint: Of their encoder.
    """

    def __init__(self, cache: Location, kind: Kind, fingerprint: str) -> None:
        self._where: tuple[Location, Kind, str] = (cache, kind, fingerprint)
        self._rows: Rows | None = None
        self._looked_s = self._cost_s = 0.0

    def __call__(self) -> Rows:
        """Rows at the last look; looks again when that is not long past."""
        if self._rows is None or time.monotonic() - self._looked_s >= PATIENCE * self._cost_s:
            return self.look()
        return self._rows

    def look(self) -> Rows:
        """Rows that are there now; reads only the commit records that are new."""
        started, first = time.monotonic(), self._rows is None
        # A damaged record is not counted; the check of the finished view names it.
        self._rows, _ = index.lasting(*self._where, known=self._rows)
        self._looked_s = time.monotonic()
        # The first look reads every record, the others only what is new.
        self._cost_s = 0.0 if first else self._looked_s - started
        return self._rows


def claim_chunks(
    missing: Mapping[str, T],
    rank: Rank,
    committed: Callable[[], Rows],
    *,
    most: int,
    alike: Callable[[T], Any],
    elsewhere: Callable[[int], None],
    look: Callable[[], Rows] | None = None,
) -> Iterator[dict[str, T]]:
    """Yield chunks until every row has been yielded or is committed: any rank ends with all done.

    Args:
        missing: The rows, by key, in an order that all ranks share.
        rank: This process among several.
        committed: Rows that need no more work.
        most: Maximum number of rows in a chunk.
        alike: Property that all rows of a chunk share, for example the bucket of a clip.
        elsewhere: Called with the number of rows that others have committed since the last call.
        look: `committed` as it is now, at any cost: called before a rank that has made its own
            part of the rest takes rows that are probably another's.
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
        elsewhere(len(there))
        if not left:
            return
        keys = share(list(left), rank, most=most)
        first = alike(left[keys[0]])
        chosen = list(takewhile(lambda key: alike(left[key]) == first, keys))  # noqa: B023
        made += len(chosen)
        yield {key: left.pop(key) for key in chosen}


def whole(missing: Mapping[str, T], *, alike: Callable[[T], Any]) -> Iterator[dict[str, T]]:
    """Yield all rows, grouped by `alike`: the chunks of a process that is alone."""
    groups: dict[Any, dict[str, T]] = {}
    for key, row in missing.items():
        groups.setdefault(alike(row), {})[key] = row
    yield from groups.values()
