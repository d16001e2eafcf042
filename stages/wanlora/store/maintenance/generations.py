"""All rows of one kind made by one encoder, with the keys that must stay.

Owns: reading a store before a collection, and the assignment of objects to segments.
Must not know: what is removed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped

from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.store import index, schema
from wanlora.store.rows import Rows
from wanlora.store.wants import Named


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

    def segment_of(self, key: str) -> str:
        """Key of the segment that an object belongs to; for a group's document, its own key."""
        depth = self.key.count("/") + (3 if schema.KINDS[self.kind].max_length is None else 2)
        return "/".join(key.split("/")[:depth])


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


def among(
    keys: Shaped[np.ndarray, " n"], wanted: Shaped[np.ndarray, " w"]
) -> Bool[np.ndarray, " n"]:
    """Membership of keys in sorted ones."""
    if not len(wanted):
        return np.zeros(len(keys), bool)
    at = np.minimum(wanted.searchsorted(keys), len(wanted) - 1)
    found: np.ndarray = wanted[at] == keys
    return found
