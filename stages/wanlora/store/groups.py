"""Documents of the groups above segments: written once, restored if damaged.

Owns: the documents of a provenance. They depend only on it, so a lost document is written again
with the same bytes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from wanlora.core.fingerprint import fingerprint as fingerprint_of
from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.errors import StoreError
from wanlora.store import commit_records, index, schema, storage

ROOT = f"{schema.STORE}/{schema.GROUP}"


def write_groups(
    cache: Location, kind: Kind, provenance: Mapping[str, Any], shape: tuple[int, ...]
) -> None:
    """Make the groups above segments of rows of this shape, unless they are there.

    Raises:
        StoreVersionError: The store belongs to another version.
        StoreError: The store's document is damaged, or the disk refuses.
    """
    for key, document in schema.groups_above(kind, fingerprint_of(provenance), provenance, shape):
        there = storage.at(cache).get(key)
        if there is None:
            storage.at(cache).put(key, document)
        elif key == ROOT:
            path = str(cache / key)
            schema.check_version(schema.own_attributes(there, path), path)


def restore_root(cache: Location) -> None:
    """Write the store's own document again if it is damaged and a segment is readable.

    Raises:
        StoreError: It is damaged, and nothing else shows that this is a store.
        StoreVersionError: It has another version, and so has everything in it.
    """
    try:
        index.open_store(cache)
    except StoreError:
        if not _has_segment(cache):
            raise
        own = {"format": schema.FORMAT, "version": schema.VERSION}
        storage.at(cache).put(ROOT, schema.group_document(own))


def _has_segment(cache: Location) -> bool:
    for kind in schema.KINDS:
        for name in storage.at(cache).folders(f"{schema.STORE}/{kind}"):
            for segment in commit_records.segment_keys(cache, kind, name):
                document = storage.at(cache).get(f"{segment}/{schema.GROUP}")
                try:
                    commit_records.parse_record(document or b"", cache, segment, kind)
                except StoreError:
                    continue
                return True
    return False


def restore(cache: Location, kind: Kind, provenance: Mapping[str, Any]) -> None:
    """Write damaged documents above the rows of an encoder again.

    Args:
        cache: Cache folder or URL.
        kind: Kind of the rows.
        provenance: Provenance of the encoder, from a view.

    Raises:
        StoreError: The disk or the object store refuses.
    """
    top = schema.fingerprint_key(kind, fingerprint_of(provenance))
    wanted = {
        f"{schema.STORE}/{kind}/{schema.GROUP}": None,
        f"{top}/{schema.GROUP}": {"kind": kind, "provenance": dict(provenance)},
    }
    if schema.KINDS[kind].max_length is None:
        wanted |= {f"{top}/{name}/{schema.GROUP}": None for name in storage.at(cache).folders(top)}
    for key, own in wanted.items():
        document = schema.group_document(own)
        if storage.at(cache).get(key) != document:
            storage.at(cache).put(key, document)


def damaged(cache: Location, kind: Kind) -> Iterator[str]:
    """Keys of the documents of encoders that do not have the provenance of their folder."""
    for name in storage.at(cache).folders(f"{schema.STORE}/{kind}"):
        try:
            index.provenance_of(cache, kind, name)
        except StoreError:
            yield f"{schema.STORE}/{kind}/{name}/{schema.GROUP}"
