"""`inspect --gc`: free the rows that no view and no unfinished run names.

Owns: the refusals of a collection that would free too much, and its counts. `store.maintenance` has
the collection itself.
"""

import time
from collections.abc import Sequence
from typing import Any

from wanlora.core.location import Location
from wanlora.errors import StoreError
from wanlora.store import maintenance, storage, wants
from wanlora.store.maintenance import Limits
from wanlora.store.views import view_names


def collect_garbage(
    cache: Location,
    limits: Limits,
    *,
    min_age_h: float,
    drop_wants: Sequence[str] = (),
    dry_run: bool = False,
) -> dict[str, Any]:
    """Free the rows that no view and no unfinished run names.

    Args:
        cache: Cache folder or URL.
        limits: Maximum size of a segment that is written again.
        min_age_h: Minimum age in hours of the rows that are freed.
        drop_wants: Unfinished runs whose rows may be freed.
        dry_run: True to only count the rows.

    Raises:
        StoreError: A view, a list of wants or a commit record is damaged (then the rows to keep are
            not known), nothing names any row, or another collection runs.
    """
    listed = wants.names(cache)
    if unknown := sorted(set(drop_wants) - set(listed)):
        raise StoreError(
            f"gc_drop_wants: {cache} has no unfinished run {', '.join(unknown)} (there are: "
            f"{', '.join(listed) or 'none'})"
        )
    kept = [name for name in listed if name not in drop_wants]
    if not kept and not view_names(cache):
        raise StoreError(
            f"{cache} has no view, so every row is unreferenced and would be freed; "
            f"make a view with: wanlora cache-latents --cache {cache}"
        )

    def named() -> wants.Named:
        return wants.named_rows(cache, ignored=drop_wants)

    found = maintenance.generations(cache, named())
    now = time.time() if dry_run else storage.at(cache).clock()
    garbage = maintenance.find_garbage(cache, found, now=now, min_age_s=3600 * min_age_h)
    if not dry_run:
        maintenance.collect(cache, found, garbage, limits, named_now=named)
        wants.drop(cache, drop_wants)
    return {
        "dry_run": dry_run,
        "rows": garbage.rows,
        "repeats": garbage.repeats,
        "young": garbage.young,
        "dropped": len(garbage.dropped),
        "rewritten": len(garbage.rewritten),
        "leftovers": len(garbage.leftovers) + len(garbage.emptied),
        "bytes": garbage.num_bytes,
        "wants": kept,
    }
