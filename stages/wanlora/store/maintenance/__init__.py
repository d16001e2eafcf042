"""Delete, rewrite and garbage-collect segments. Segments are never modified in place.

First, rows to keep are committed in another segment (`rewrite`). Then the old segments are listed
(`store.condemned`). Last, they are removed, commit records first (`remove`). So a reader finds
every kept row at any time, a writer never relies on a row that will be removed, and a kill leaves
only repeated rows or segments without a record, which the next collection frees.
"""

from wanlora.store.maintenance.collect import collect
from wanlora.store.maintenance.garbage import Garbage, find_garbage
from wanlora.store.maintenance.generations import Generation, generations
from wanlora.store.maintenance.remove import drop_segments
from wanlora.store.maintenance.rewrite import Limits, keep_only

__all__ = [
    "Garbage",
    "Generation",
    "Limits",
    "collect",
    "drop_segments",
    "find_garbage",
    "generations",
    "keep_only",
]
