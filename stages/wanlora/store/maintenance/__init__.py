"""Delete, rewrite and garbage-collect segments. Segments are never modified in place.

Rows to keep are committed in another segment first (`rewrite`), then the segments that go are
listed (`store.condemned`), and only then removed, their commit records first (`remove`). So a
reader finds every kept row at every instant, a writer never counts on a row that goes, and a kill
leaves at most a row twice or a segment without a record, which the next collection frees.
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
