"""Index of committed rows: a listing of the commit records, and their content.

Owns: which rows are valid and where they are stored. A segment without a commit record does not
exist. The content of records is kept in a snapshot beside the store, because a segment never
changes; which records exist is read from the store every time.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wanlora.core.fingerprint import difference
from wanlora.core.fingerprint import fingerprint as fingerprint_of
from wanlora.core.location import Location
from wanlora.errors import StaleStoreError, StoreError, StoreVersionError
from wanlora.store import condemned, schema, storage
from wanlora.store import rows as row_tables
from wanlora.store.rows import Rows
from wanlora.store.schema import DAMAGE, Kind


@dataclass(frozen=True, slots=True)
class Segment:
    """A commit record: key of the segment's group and what it says.

    `record` holds the rest of it: sources or prompts, latent_rgb, writer.
    """

    key: str
    kind: Kind
    row_keys: tuple[str, ...]
    crc32c: tuple[int, ...]
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The segment's own id; the lowest wins when two segments hold one row."""
        return self.key.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class Damaged:
    """A commit record that cannot be used: key of the segment's group, and a line for people."""

    key: str
    message: str


def has_store(cache: Location) -> bool:
    """Whether a cache folder holds a store, of a version this release knows.

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
    """Check that a cache folder holds a store of a version this release knows.

    Raises:
        StoreError: There is none; says how to make it.
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
    """Locate every committed row. Only records that are not known yet are read.

    The content of a segment never changes, so what was read once stays true; the listing decides
    which segments exist. The result does not depend on what is known.

    Args:
        cache: Cache folder or URL.
        kind: Kind of the rows.
        fingerprint: Of the encoder.
        known: An earlier result; None = the snapshot that `keep` left in the cache, if any.

    Returns:
        The rows, and the records that cannot be used.

    Raises:
        StoreVersionError: A record of another version.
        StoreError: The disk or the object store refuses.
    """
    there = _listing(cache, kind, fingerprint)
    if known is None:
        known = _kept(cache, kind, fingerprint)
    stay = {
        segment
        for segment, size in zip(known.segments, known.record_bytes.tolist(), strict=True)
        if there.get(segment) == size
    }
    tables, damaged = [known.only(stay)], []
    for found in _read(cache, kind, fingerprint, [key for key in there if key not in stay]):
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
    """Locate the rows that a writer may count on, as `look` does: not those about to be removed.

    Call it after `wants.publish`. Raises the same errors.
    """
    going = condemned.segments(cache)  # before the listing: afterwards they may be gone from both
    rows, damaged = look(cache, kind, fingerprint, known=known)
    stay = [segment for segment in rows.segments if segment not in going]
    return rows.only(set(stay)), damaged


def keep(cache: Location, kind: Kind, fingerprint: str, rows: Rows) -> None:
    """Leave what is committed to later processes, so that they need not read it again.

    A snapshot is a help and nothing else: it may be old, damaged or deleted at any time.
    """
    data = row_tables.to_bytes(rows, f"{kind} {fingerprint}")
    storage.at(cache).put(schema.snapshot_key(kind, fingerprint), data)


def _kept(cache: Location, kind: Kind, fingerprint: str) -> Rows:
    data = storage.at(cache).get(schema.snapshot_key(kind, fingerprint))
    kept = None if data is None else row_tables.from_bytes(data, f"{kind} {fingerprint}")
    return row_tables.join([]) if kept is None else kept


def _listing(cache: Location, kind: Kind, fingerprint: str) -> dict[str, int]:
    """Bytes of the commit record of every segment that is there, by the segment's key."""
    return segment_keys(cache, kind, schema.short(fingerprint))


def segment_keys(cache: Location, kind: Kind, name: str) -> dict[str, int]:
    """Keys of the committed segments in the folder of an encoder, with the bytes of each record."""
    top = f"{schema.STORE}/{kind}/{name}"
    parents = [top]
    if kind == "latents":
        parents = [f"{top}/{shape}" for shape in storage.at(cache).folders(top)]
    return {
        f"{parent}/{segment}": size
        for parent in parents
        for segment, size in storage.at(cache).sizes_in_folders(parent, schema.GROUP).items()
    }


def read_records(
    cache: Location, kind: Kind, fingerprint: str, keys: Sequence[str] | None = None
) -> Iterator[Segment | Damaged]:
    """Read commit records one after the other; with `keys`, only those of these segments.

    Raises:
        StoreVersionError: A record of another version.
        StoreError: The disk or the object store refuses.
    """
    if keys is None:
        keys = sorted(_listing(cache, kind, fingerprint), key=_name_of)
    return _read(cache, kind, fingerprint, keys)


def _name_of(segment: str) -> str:
    return segment.rpartition("/")[2]


def _read(
    cache: Location, kind: Kind, fingerprint: str, keys: Sequence[str]
) -> Iterator[Segment | Damaged]:
    """Parse the commit records of some segments; one that has gone since is left out."""
    documents = storage.at(cache).get_many([f"{key}/{schema.GROUP}" for key in keys])
    for key, document in zip(keys, documents, strict=True):
        if document is None:
            continue
        try:
            yield _segment(document, key, kind, fingerprint)
        except StoreVersionError:
            if schema.has_checksum(document):  # whole, so it really is of another release
                raise
            yield Damaged(key, f"{cache / key}: damaged commit record (its version)")
        except DAMAGE as error:
            what = f"damaged commit record ({type(error).__name__}: {error})"
            yield Damaged(key, f"{cache / key}: {what}")


def _segment(document: bytes, key: str, kind: Kind, fingerprint: str) -> Segment:
    own = _checked(document, key, kind)
    if own["fingerprint"] != fingerprint:
        raise ValueError(f"it belongs to {own['fingerprint']}, not to this folder")
    sums = tuple(own["crc32c"][schema.ROW_ARRAY[kind]])
    return Segment(key, kind, tuple(own["keys"]), sums, own)


def record_in(document: bytes, cache: Location, segment: str, kind: Kind) -> Mapping[str, Any]:
    """Parse a commit record.

    Raises:
        StoreError: It is damaged; names the command that repairs the cache.
        StoreVersionError: It has another version.
    """
    try:
        return _checked(document, segment, kind)
    except DAMAGE as error:
        message = f"{cache / segment}: damaged commit record ({type(error).__name__}: {error})"
        raise _refusal(cache, [Damaged(segment, message)]) from error


def _checked(document: bytes, key: str, kind: Kind) -> dict[str, Any]:
    """Parse a commit record and check everything in it that is used."""
    group = json.loads(document)
    own: dict[str, Any] = group["attributes"]["wanlora"]
    schema.check_version(own, f"{key}/{schema.GROUP}")
    whole = schema.has_checksum(document)
    if whole is False:
        raise ValueError("its bytes do not match its checksum")
    if (group["zarr_format"], group["node_type"], own["kind"]) != (3, "group", "segment"):
        raise ValueError("it is not the Zarr v3 group of a segment")
    keys = own["keys"]
    if not all(isinstance(k, str) and k and k.isascii() and k.isprintable() for k in keys):
        raise ValueError("a key is not printable ASCII")
    sums = own["crc32c"]
    for name, column in {schema.ROW_ARRAY[kind]: sums[schema.ROW_ARRAY[kind]], **sums}.items():
        if not 0 < own["count"] == len(keys) == len(column):
            raise ValueError(f"{own['count']} rows, {len(keys)} keys, {len(column)} {name} sums")
        if not all(map(_is_crc32c, column)):
            raise ValueError(f"a checksum of {name} is not an unsigned 32-bit number")
    if whole is None:
        _check_details(own)
    return own


def _check_details(own: Mapping[str, Any]) -> None:
    """Check the rest of a record without a checksum (of 0.1.0), as far as readers use it."""
    for name in ("sources", "prompts"):
        if not isinstance(own.get(name, []), list):
            raise TypeError(f"{name} is not a list")
    for name, num_bytes in own.get("sizes", {}).items():
        if type(num_bytes) is not int:
            raise TypeError(f"the size of {name} is not a number")
    if (rgb := own.get("latent_rgb")) is not None:
        gram, cross = (np.asarray(rgb[name], np.float64) for name in ("gram", "cross"))
        if gram.shape != (len(cross), len(cross)) or cross.shape != (len(gram), 3):
            raise ValueError(f"latent_rgb has the shapes {gram.shape} and {cross.shape}")


def _is_crc32c(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**32


def segments_of(cache: Location, kind: Kind, fingerprint: str) -> list[Segment]:
    """Read all commit records in the order of their ids, and refuse a store with damaged ones.

    They take 17 kB per segment in memory: for tests and small stores.

    Raises:
        StoreError: Names the first damaged records and the command that repairs them.
    """
    found = list(read_records(cache, kind, fingerprint))
    _refuse(cache, [each for each in found if isinstance(each, Damaged)])
    return [each for each in found if isinstance(each, Segment)]


def _refuse(cache: Location, damaged: Sequence[Damaged]) -> None:
    if damaged:
        raise _refusal(cache, damaged)


def _refusal(cache: Location, damaged: Sequence[Damaged]) -> StoreError:
    return StoreError(
        f"{len(damaged)} damaged commit records in {cache / schema.STORE}:\n"
        + "\n".join(f"  {record.message}" for record in damaged[:3])
        + f"\nrepair it with: wanlora inspect {cache} --repair; or delete these folders and run: "
        f"wanlora cache-latents --cache {cache}"
    )


def rows_of(segments: Iterable[Segment]) -> Rows:
    """Locate every row of these segments. Where they share a row, the lowest segment id wins."""
    return row_tables.join([_rows_of_one(segment, 0) for segment in segments])


def _rows_of_one(segment: Segment, record_bytes: int) -> Rows:
    return row_tables.of_segment(segment.key, segment.row_keys, segment.crc32c, record_bytes)


def missing_keys(cache: Location, kind: Kind, fingerprint: str, keys: Iterable[str]) -> list[str]:
    """Those of the keys that a writer must encode, each once, in their order (`lasting`).

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
        StaleStoreError: Shows, field by field, how what the store has differs from what is wanted.
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
