"""Commit records of segments, read and checked.

Owns: the listing of records, the checks of their content, and the error for damaged ones.
Must not know: rows of several segments, snapshots.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wanlora.core import units
from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.errors import StoreError, StoreVersionError
from wanlora.store import schema, storage
from wanlora.store.schema import DAMAGE


@dataclass(frozen=True, slots=True)
class Segment:
    """A commit record: key of the segment's group, and its content.

    `record` holds the whole content, which includes sources or prompts, latent_rgb and writer.
    """

    key: str
    kind: Kind
    row_keys: tuple[str, ...]
    crc32c: tuple[int, ...]
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Damaged:
    """A commit record that cannot be used: key of the segment's group, and the reason."""

    key: str
    message: str


def segment_keys(cache: Location, kind: Kind, name: str) -> dict[str, int]:
    """Keys of the committed segments in the folder of an encoder, with the bytes of each record."""
    top = f"{schema.STORE}/{kind}/{name}"
    parents = [top]
    if schema.KINDS[kind].max_length is None:
        parents = [f"{top}/{shape}" for shape in storage.at(cache).folders(top)]
    return {
        f"{parent}/{segment}": size
        for parent in parents
        for segment, size in storage.at(cache).sizes_in_folders(parent, schema.GROUP).items()
    }


def is_committed(cache: Location, segment: str) -> bool:
    """Return whether a key is that of a segment with a commit record."""
    in_store = segment.startswith(f"{schema.STORE}/")
    return in_store and storage.at(cache).get(f"{segment}/{schema.GROUP}") is not None


def read_records(
    cache: Location, kind: Kind, fingerprint: str, keys: Sequence[str] | None = None
) -> Iterator[Segment | Damaged]:
    """Read commit records one after the other; with `keys`, only those of these segments.

    A record that was removed after the listing is left out.

    Raises:
        StoreVersionError: A record of another version.
        StoreError: The disk or the object store refuses.
    """
    if keys is None:
        found = segment_keys(cache, kind, schema.short(fingerprint))
        keys = sorted(found, key=lambda key: key.rpartition("/")[2])
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
    sums = tuple(own["crc32c"][schema.KINDS[kind].array])
    return Segment(key, kind, tuple(own["keys"]), sums, own)


def parse_record(document: bytes, cache: Location, segment: str, kind: Kind) -> Mapping[str, Any]:
    """Parse a commit record.

    Raises:
        StoreError: It is damaged; names the command that repairs the cache.
        StoreVersionError: It has another version.
    """
    try:
        return _checked(document, segment, kind)
    except DAMAGE as error:
        message = f"{cache / segment}: damaged commit record ({type(error).__name__}: {error})"
        raise refusal(cache, [Damaged(segment, message)]) from error


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
    for name, column in {schema.KINDS[kind].array: sums[schema.KINDS[kind].array], **sums}.items():
        if not 0 < own["count"] == len(keys) == len(column):
            raise ValueError(f"{own['count']} rows, {len(keys)} keys, {len(column)} {name} sums")
        if not all(map(_is_crc32c, column)):
            raise ValueError(f"a checksum of {name} is not an unsigned 32-bit number")
    if whole is None:
        _check_details(own)
    return own


def _check_details(own: Mapping[str, Any]) -> None:
    """Check the fields that readers use in a record without a checksum (release 0.1.0)."""
    for name in (layout.origins for layout in schema.KINDS.values()):
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


def refusal(cache: Location, damaged: Sequence[Damaged]) -> StoreError:
    """Build the error for records that cannot be used; it names the first ones and the repair."""
    messages = [record.message for record in damaged]
    lines = units.first(messages, f"the output of wanlora inspect {cache}", most=3)
    return StoreError(
        f"{len(damaged)} damaged commit records in {cache / schema.STORE}:\n"
        + "\n".join(lines)
        + f"\nrepair it with: wanlora inspect {cache} --repair; or delete these folders and run: "
        f"wanlora cache-latents --cache {cache}"
    )
