"""What is committed: a listing of the commit records, and what they say.

Owns: which rows are valid and where they lie. A segment without its commit record does not exist.
What a record says is kept in a snapshot beside the store, because a segment never changes; whether
it is there is asked of the store, every time.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from wanlora.core.fingerprint import difference
from wanlora.core.fingerprint import fingerprint as fingerprint_of
from wanlora.core.location import Location
from wanlora.errors import StaleStoreError, StoreError
from wanlora.store import objects, schema
from wanlora.store import rows as row_tables
from wanlora.store.rows import Rows
from wanlora.store.schema import Kind


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
    document = objects.get(cache, key)
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
    """Every whole fingerprint of a kind that the store has, with its provenance."""
    found = {}
    for name in objects.folders(cache, f"{schema.STORE}/{kind}"):
        key = f"{schema.STORE}/{kind}/{name}/{schema.GROUP}"
        document = objects.get(cache, key)
        if document is None:  # a writer was killed before it could say what it was about to write
            continue
        provenance = schema.own_attributes(document, str(cache / key)).get("provenance", {})
        whole = fingerprint_of(provenance)
        if schema.short(whole) != name:
            raise StoreError(
                f"{cache / key} was changed by hand: its provenance has the fingerprint "
                f"{schema.short(whole)}, not {name}; restore it, or delete that file and run "
                f"wanlora cache-latents --cache {cache}, which writes it anew"
            )
        found[whole] = dict(provenance)
    return found


def scan(
    cache: Location, kind: Kind, fingerprint: str, *, known: Collection[str] = ()
) -> tuple[list[Segment], list[Damaged]]:
    """Read commit records under a fingerprint, with everything that they say.

    Args:
        cache: Cache folder or URL.
        kind: Which rows.
        fingerprint: Of their encoder.
        known: Keys of segments that are left out: a record never changes.

    Returns:
        Segments in the order of their ids, and the records that cannot be used.

    Raises:
        StoreVersionError: A record of another version.
    """
    keys = [key for key in _listing(cache, kind, fingerprint) if key not in known]
    found = list(_read(cache, kind, fingerprint, keys))
    segments = [each for each in found if isinstance(each, Segment)]
    damaged = [each for each in found if isinstance(each, Damaged)]
    return sorted(segments, key=lambda segment: segment.name), damaged


def committed(cache: Location, kind: Kind, fingerprint: str, *, known: Rows | None = None) -> Rows:
    """Locate every committed row. Only records that are not known yet are read.

    What a segment holds never changes, so what was read of it once is true for ever; the listing
    says which segments are there. The result is that of `scan`, whatever is known.

    Args:
        cache: Folder or URL.
        kind: What the rows are.
        fingerprint: Of the encoder.
        known: An earlier result; None = the snapshot that `keep` left in the cache, if any.

    Raises:
        StoreError: A record is damaged; names the first, and how to get their rows back.
        StoreVersionError: A record of another version.
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
    _refuse(cache, damaged)
    return tables[0] if len(tables) == 1 else row_tables.join(tables)


def keep(cache: Location, kind: Kind, fingerprint: str, rows: Rows) -> None:
    """Leave what is committed to later processes, so that they need not read it again.

    A snapshot is a help and nothing else: it may be old, damaged or deleted at any time.
    """
    data = row_tables.to_bytes(rows, f"{kind} {fingerprint}")
    objects.put(cache, schema.snapshot_key(kind, fingerprint), data)


def _kept(cache: Location, kind: Kind, fingerprint: str) -> Rows:
    data = objects.get(cache, schema.snapshot_key(kind, fingerprint))
    kept = None if data is None else row_tables.from_bytes(data, f"{kind} {fingerprint}")
    return row_tables.join([]) if kept is None else kept


def _listing(cache: Location, kind: Kind, fingerprint: str) -> dict[str, int]:
    """Bytes of the commit record of every segment that is there, by the segment's key."""
    top = schema.fingerprint_key(kind, fingerprint)
    parents = [top]
    if kind == "latents":
        parents = [f"{top}/{name}" for name in objects.folders(cache, top)]
    return {
        f"{parent}/{name}": size
        for parent in parents
        for name, size in objects.sizes_in_folders(cache, parent, schema.GROUP).items()
    }


def _read(
    cache: Location, kind: Kind, fingerprint: str, keys: Sequence[str]
) -> Iterator[Segment | Damaged]:
    """Parse the commit records of some segments; one that has gone since is none."""
    documents = objects.get_many(cache, [f"{key}/{schema.GROUP}" for key in keys])
    for key, document in zip(keys, documents, strict=True):
        if document is None:
            continue
        try:
            yield _segment(document, key, kind, fingerprint)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"damaged commit record ({type(error).__name__}: {error})"
            yield Damaged(key, f"{cache / key}: {what}")


def _segment(document: bytes, key: str, kind: Kind, fingerprint: str) -> Segment:
    own = json.loads(document)["attributes"]["wanlora"]
    schema.check_version(own, f"{key}/{schema.GROUP}")
    if own["kind"] != "segment" or own["fingerprint"] != fingerprint:
        raise ValueError(f"it belongs to {own['kind']} {own['fingerprint']}, not to this folder")
    keys = tuple(str(row_key) for row_key in own["keys"])
    sums = tuple(int(crc) for crc in own["crc32c"][schema.ROW_ARRAY[kind]])
    if not len(keys) == len(sums) == own["count"]:
        raise ValueError(f"{own['count']} rows, {len(keys)} keys, {len(sums)} checksums")
    return Segment(key, kind, keys, sums, own)


def segments_of(cache: Location, kind: Kind, fingerprint: str) -> list[Segment]:
    """Scan, and refuse a store with damaged commit records.

    Raises:
        StoreError: Names the first records and how to get their rows back.
    """
    segments, damaged = scan(cache, kind, fingerprint)
    _refuse(cache, damaged)
    return segments


def _refuse(cache: Location, damaged: Sequence[Damaged]) -> None:
    if damaged:
        raise StoreError(
            f"{len(damaged)} damaged commit records in {cache / schema.STORE}:\n"
            + "\n".join(f"  {record.message}" for record in damaged[:3])
            + f"\nmend it with: wanlora inspect {cache} --repair; or delete these folders and run: "
            f"wanlora cache-latents --cache {cache}"
        )


def rows_of(segments: Iterable[Segment]) -> Rows:
    """Locate every row of these segments. Where they share a row, the lowest segment id wins."""
    return row_tables.join([_rows_of_one(segment, 0) for segment in segments])


def _rows_of_one(segment: Segment, record_bytes: int) -> Rows:
    return row_tables.of_segment(segment.key, segment.row_keys, segment.crc32c, record_bytes)


def committed_keys(cache: Location, kind: Kind, fingerprint: str) -> AbstractSet[str]:
    """Keys of all rows that are committed under a fingerprint."""
    return committed(cache, kind, fingerprint).keys()


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
