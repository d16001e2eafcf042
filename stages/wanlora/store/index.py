"""What is committed: a scan of the commit records.

Owns: which rows are valid and where they lie. There is no other index: a segment without its
commit record does not exist, and everything else can be worked out from the records.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wanlora.core.fingerprint import difference
from wanlora.core.fingerprint import fingerprint as fingerprint_of
from wanlora.core.location import Location
from wanlora.errors import StaleStoreError, StoreError
from wanlora.store import objects, schema
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


@dataclass(frozen=True, slots=True)
class Row:
    """Where one row lies, and its checksum."""

    segment: str
    row: int
    crc32c: int


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
    """Read the commit records under a fingerprint.

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
    top = schema.fingerprint_key(kind, fingerprint)
    parents = [top]
    if kind == "latents":
        parents = [f"{top}/{name}" for name in objects.folders(cache, top)]
    names = [f"{parent}/{name}" for parent in parents for name in objects.folders(cache, parent)]
    keys = [key for key in names if key not in known]
    segments, invalid = [], []
    documents = objects.get_many(cache, [f"{key}/{schema.GROUP}" for key in keys])
    for key, document in zip(keys, documents, strict=True):
        if document is None:  # not committed
            continue
        try:
            segments.append(_segment(document, key, kind, fingerprint))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"damaged commit record ({type(error).__name__}: {error})"
            invalid.append(Damaged(key, f"{cache / key}: {what}"))
    return sorted(segments, key=lambda segment: segment.name), invalid


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
    segments, invalid = scan(cache, kind, fingerprint)
    if invalid:
        raise StoreError(
            f"{len(invalid)} damaged commit records in {cache / schema.STORE}:\n"
            + "\n".join(f"  {line}" for line in [damaged.message for damaged in invalid[:3]])
            + f"\nmend it with: wanlora inspect {cache} --repair; or delete these folders and run: "
            f"wanlora cache-latents --cache {cache}"
        )
    return segments


def rows_of(segments: Iterable[Segment]) -> dict[str, Row]:
    """Locate every row. Where segments share a row, the lowest segment id wins."""
    rows: dict[str, Row] = {}
    for segment in sorted(segments, key=lambda segment: segment.name):
        for row, (key, crc) in enumerate(zip(segment.row_keys, segment.crc32c, strict=True)):
            rows.setdefault(key, Row(segment.key, row, crc))
    return rows


def committed_keys(cache: Location, kind: Kind, fingerprint: str) -> set[str]:
    """Keys of all rows that are committed under a fingerprint."""
    return {key for segment in segments_of(cache, kind, fingerprint) for key in segment.row_keys}


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
