"""Names, attributes and versions of the store: format version 1 (docs/store-format.md).

Owns: the layout as text and JSON. Must not know: files, arrays.
Legend: C, F, H, W = channels, frames, height, width of latents; D = width of prompt_embeds.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google_crc32c import value as crc32c_of

from wanlora.core.buckets import MAX_TOKENS
from wanlora.core.fingerprint import SHORT
from wanlora.core.kinds import Kind
from wanlora.errors import StoreError, StoreVersionError

FORMAT = "wanlora-cache"
VERSION = 1
STORE = "store.zarr"
VIEWS = "views"
WANTS = "wants"
"""Folder of the views that runs of `cache-latents` have not published yet (`store.wants`)."""

CONDEMNED = "condemned"
"""Folder of the lists of segments that a collection is about to remove (`store.condemned`)."""

SNAPSHOTS = "index"
GROUP = "zarr.json"
"""Document of a group; for a segment, it is the commit record, written last."""


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Layout of the rows of one kind.

    Attributes:
        array: Array that holds the rows; the commit record stores checksums under its name.
        dimensions: Names of the dimensions of `array`, rows first.
        origins: Field of the commit record that holds the origin of each row.
        max_length: None if all rows of a segment have one shape, which is a level of its path.
            Otherwise rows have 1 to `max_length` items: the array pads them with zeros, and the
            array `length` has their numbers of items.
    """

    array: str
    dimensions: tuple[str, ...]
    origins: str
    max_length: int | None = None

    @property
    def per_clip(self) -> bool:
        """Return True if the keys of rows are those of clips, False if those of prompts."""
        return self.dimensions[0] == "clip"

    def shape(self, row: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in which a segment stores a row of this shape."""
        return row if self.max_length is None else (self.max_length, *row[1:])


_FRAMES = ("clip", "channel", "frame", "height", "width")


KINDS: dict[Kind, RowLayout] = {
    "latents": RowLayout("latent", _FRAMES, "sources"),
    "text": RowLayout("embedding", ("prompt", "token", "channel"), "prompts", MAX_TOKENS),
    "cond_latents": RowLayout("cond_latent", _FRAMES, "sources"),
    "clip_vision": RowLayout("image_embedding", ("clip", "token", "channel"), "sources"),
}
LENGTHS = "length"
"""Array with the number of items of each row, for kinds with a `max_length`."""

DAMAGE = (
    ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError,
)  # fmt: skip
"""Errors that damaged JSON raises, in the parser or in the code that uses its values."""

UNSUMMED = "00000000"
_CHECKSUM = re.compile(rb'("checksum": ")([0-9a-f]{8})(")')


def short(fingerprint: str) -> str:
    """Shorten a fingerprint for a path; the whole one is in every commit record."""
    return fingerprint[:SHORT]


def fingerprint_key(kind: Kind, fingerprint: str) -> str:
    """Key of the group that holds everything made by one encoder with one set of settings."""
    return f"{STORE}/{kind}/{short(fingerprint)}"


def segments_key(kind: Kind, fingerprint: str, shape: tuple[int, ...]) -> str:
    """Key of the group whose children are segments of rows of this shape.

    Args:
        kind: Kind of the rows.
        fingerprint: Fingerprint of the encoder.
        shape: Shape of a row, for example (C, F, H, W); (512, D) of prompts has no level in the
            path.
    """
    key = fingerprint_key(kind, fingerprint)
    return f"{key}/{'x'.join(map(str, shape))}" if KINDS[kind].max_length is None else key


def snapshot_key(kind: str, fingerprint: str) -> str:
    """Key of the snapshot of the commit records of a fingerprint."""
    return f"{SNAPSHOTS}/{kind}-{short(fingerprint)}.npz"


def shape_of(segments: str) -> tuple[int, ...]:
    """Shape (C, F, H, W) from the name of a bucket's group."""
    return tuple(int(size) for size in segments.rsplit("/", 1)[-1].split("x"))


def groups_above(
    kind: Kind, fingerprint: str, provenance: Mapping[str, Any], shape: tuple[int, ...]
) -> list[tuple[str, bytes]]:
    """Documents of the groups above a segment, outermost first.

    Without them a plain Zarr client would see an empty store. Their bytes depend only on
    the arguments, so concurrent writers write the same bytes.
    """
    groups = {
        STORE: {"format": FORMAT, "version": VERSION},
        f"{STORE}/{kind}": None,
        fingerprint_key(kind, fingerprint): {"kind": kind, "provenance": dict(provenance)},
    }
    groups.setdefault(segments_key(kind, fingerprint, shape), None)
    return [(f"{key}/{GROUP}", group_document(own)) for key, own in groups.items()]


def group_document(own: Mapping[str, Any] | None) -> bytes:
    """Zarr v3 document of a group whose attribute `wanlora` is `own`."""
    document = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {} if own is None else {"wanlora": own},
    }
    return json.dumps(document, sort_keys=True, indent=1, allow_nan=False).encode()


def commit_record(own: Mapping[str, Any]) -> bytes:
    """Document of a segment's group: the commit record, with a checksum over its own bytes.

    The checksum is the CRC-32C of the document in which its eight digits are zeros.
    """
    return signed(group_document({**own, "checksum": UNSUMMED}))


def signed(document: bytes) -> bytes:
    """Replace the zeros in a commit record by the checksum."""
    return _CHECKSUM.sub(rb"\g<1>%08x\g<3>" % crc32c_of(document), document, count=1)


def has_checksum(document: bytes) -> bool | None:
    """Compare a commit record with its checksum; None if it has none (written by 0.1.0)."""
    found = _CHECKSUM.search(document)
    if found is None:
        return None
    unsummed = document[: found.start(2)] + UNSUMMED.encode() + document[found.end(2) :]
    return int(found[2], 16) == int(crc32c_of(unsummed))


def own_attributes(document: bytes, key: str) -> dict[str, Any]:
    """Read the attribute `wanlora` of a group's document.

    Raises:
        StoreError: It is not a document that wanlora wrote.
    """
    try:
        own = json.loads(document)["attributes"]["wanlora"]
    except DAMAGE:
        own = None
    if not isinstance(own, dict):
        raise StoreError(
            f"{key} is damaged or not part of a latent cache: expected a Zarr group with an "
            "attribute 'wanlora'; repair the cache with wanlora inspect CACHE --repair, or choose "
            "another folder with --cache"
        )
    return own


def check_version(own: Mapping[str, Any], key: str, *, name: str = FORMAT) -> None:
    """Refuse a format or version that this release does not support.

    Raises:
        StoreVersionError: Names the file, the version found and the supported one.
    """
    found = own.get("format", name), own.get("version")
    if found != (name, VERSION):
        raise StoreVersionError(
            f"{key} is {found[0]!r} version {found[1]!r}; this wanlora reads and writes {name!r} "
            f"version {VERSION}: install the release that wrote it, or choose another folder with "
            "--cache and run wanlora cache-latents"
        )
