"""Index of committed rows: a listing of the commit records, and their content.

Owns: the list of valid rows and their places. A segment without a commit record does not exist.
The content of records is kept in a snapshot beside the store, because a segment never changes. The
list of records is read from the store every time.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wanlora.core.fingerprint import difference
from wanlora.core.fingerprint import fingerprint as fingerprint_of
from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.errors import StaleStoreError, StoreError
from wanlora.store import condemned, schema, storage
from wanlora.store import rows as row_tables
from wanlora.store.commit_records import Damaged, Segment, read_records, refusal, segment_keys
from wanlora.store.rows import Rows
from wanlora.store.schema import DAMAGE


def has_store(cache: Location) -> bool:
    """Return whether a cache folder holds a store of a version that this release supports.

    Raises:
        StoreVersionError: Another version.
    """
    key = f"{schema.STORE}/{schema.GROUP}"
    document = storage.at(cache).get(key)
    if document is None:
        return False
    schema.check_version(schema.own_attributes(document, str(cache / key)), str(cache / key))
    return True


def open_store(cache: Location) -> None:
    """Check that a cache folder holds a store of a version that this release supports.

    Raises:
        StoreError: There is no store; the message names the command that makes one.
        StoreVersionError: Another version.
    """
    if not has_store(cache):
        raise StoreError(
            f"no latent cache in {cache}: expected {cache / schema.STORE}; make one with: "
            f"wanlora cache-latents --cache {cache}"
        )


def provenances(cache: Location, kind: Kind) -> dict[str, dict[str, Any]]:
    """Read every whole fingerprint of a kind that the store has, with its provenance.

    Raises:
        StoreError: A document is damaged; names it.
    """
    found = {}
    for name in storage.at(cache).folders(f"{schema.STORE}/{kind}"):
        provenance = provenance_of(cache, kind, name)
        if provenance is not None:
            found[fingerprint_of(provenance)] = provenance
    return found


def provenance_of(cache: Location, kind: Kind, name: str) -> dict[str, Any] | None:
    """Read the provenance of the encoder of a folder; None if a kill left it without a document.

    Raises:
        StoreError: The document is damaged; names it.
    """
    key = f"{schema.STORE}/{kind}/{name}/{schema.GROUP}"
    document = storage.at(cache).get(key)
    if document is None:
        return None
    try:
        own = schema.own_attributes(document, str(cache / key))
        provenance = dict(own.get("provenance", {}))
        found = schema.short(fingerprint_of(provenance))
    except DAMAGE as error:
        found = f"none ({type(error).__name__}: {error})"
    if found != name:
        raise StoreError(
            f"{cache / key} is damaged or was changed by hand: its provenance has the fingerprint "
            f"{found}, not {name}; repair the cache with: wanlora inspect {cache} --repair"
        )
    return provenance


def look(
    cache: Location, kind: Kind, fingerprint: str, *, known: Rows | None = None
) -> tuple[Rows, list[Damaged]]:
    """Locate every committed row. Reads only the records that are not in `known`.

    The content of a segment never changes, so an earlier result stays valid. The listing decides
    which segments exist. The result does not depend on `known`.

    Args:
        cache: Cache folder or URL.
        kind: Kind of the rows.
        fingerprint: Fingerprint of the encoder.
        known: An earlier result; None = the snapshot that `keep` wrote to the cache, if any.

    Returns:
        The rows, and the records that cannot be used.

    Raises:
        StoreVersionError: A record of another version.
        StoreError: The disk or the object store refuses.
    """
    there = segment_keys(cache, kind, schema.short(fingerprint))
    if known is None:
        known = _kept(cache, kind, fingerprint)
    stay = {
        segment
        for segment, size in zip(known.segments, known.record_bytes.tolist(), strict=True)
        if there.get(segment) == size
    }
    tables, damaged = [known.only(stay)], []
    for found in read_records(cache, kind, fingerprint, [key for key in there if key not in stay]):
        if isinstance(found, Segment):
            tables.append(_rows_of_one(found, there[found.key]))
        else:
            damaged.append(found)
    return tables[0] if len(tables) == 1 else row_tables.join(tables), damaged


def committed(cache: Location, kind: Kind, fingerprint: str, *, known: Rows | None = None) -> Rows:
    """Locate every committed row as `look` does, and refuse a store with damaged records.

    Raises:
        StoreError: A record is damaged; names the first ones and the command that repairs them.
        StoreVersionError: A record of another version.
    """
    rows, damaged = look(cache, kind, fingerprint, known=known)
    _refuse(cache, damaged)
    return rows


def lasting(
    cache: Location, kind: Kind, fingerprint: str, *, known: Rows | None = None
) -> tuple[Rows, list[Damaged]]:
    """Locate the rows that will stay: those of `look` without the ones about to be removed.

    Call it after `wants.publish`. Raises the same errors as `look`.
    """
    going = condemned.segments(cache)  # before the listing: afterwards they may be gone from both
    rows, damaged = look(cache, kind, fingerprint, known=known)
    stay = [segment for segment in rows.segments if segment not in going]
    return rows.only(set(stay)), damaged


def keep(cache: Location, kind: Kind, fingerprint: str, rows: Rows) -> None:
    """Write a snapshot of the committed rows, so that later processes read fewer records.

    The snapshot is only an optimisation: it may be old, damaged or deleted at any time.
    """
    data = row_tables.to_bytes(rows, f"{kind} {fingerprint}")
    storage.at(cache).put(schema.snapshot_key(kind, fingerprint), data)


def _kept(cache: Location, kind: Kind, fingerprint: str) -> Rows:
    data = storage.at(cache).get(schema.snapshot_key(kind, fingerprint))
    kept = None if data is None else row_tables.from_bytes(data, f"{kind} {fingerprint}")
    return row_tables.join([]) if kept is None else kept


def _refuse(cache: Location, damaged: Sequence[Damaged]) -> None:
    if damaged:
        raise refusal(cache, damaged)


def rows_of(segments: Iterable[Segment]) -> Rows:
    """Locate every row of these segments. If two have the same row, the lowest segment id wins."""
    return row_tables.join([_rows_of_one(segment, 0) for segment in segments])


def _rows_of_one(segment: Segment, record_bytes: int) -> Rows:
    return row_tables.of_segment(segment.key, segment.row_keys, segment.crc32c, record_bytes)


def missing_keys(cache: Location, kind: Kind, fingerprint: str, keys: Iterable[str]) -> list[str]:
    """Keys that a writer must encode, in the given order, without repeats (see `lasting`).

    Raises:
        StoreError: A commit record is damaged.
    """
    rows, damaged = lasting(cache, kind, fingerprint)
    _refuse(cache, damaged)
    return rows.missing(list(dict.fromkeys(keys)))


def require_fingerprint(
    cache: Location, kind: Kind, fingerprint: str, wanted: Mapping[str, Any] | None
) -> None:
    """Refuse a store that has nothing made with these weights and settings.

    Raises:
        StaleStoreError: Lists the fields in which the store differs from the wanted settings.
    """
    found = provenances(cache, kind)
    if fingerprint in found:
        return
    lines = [f"{cache / schema.STORE} has no {kind} with the fingerprint {fingerprint[:16]}"]
    for other, provenance in found.items():
        lines.append(f"it has {kind} {other[:16]}" + (", which differs in:" if wanted else ""))
        lines += [f"  {line}" for line in (difference(provenance, wanted) if wanted else ())]
    if not found:
        lines[0] += f", nor any other {kind}"
    lines.append(f"encode again with: wanlora cache-latents --cache {cache}")
    raise StaleStoreError("\n".join(lines))
