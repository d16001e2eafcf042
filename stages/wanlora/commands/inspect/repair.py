"""`inspect --repair`: drop bad rows, and encode only those again.

Owns: the steps of a repair. Only rows that no reader could use are dropped; they are
encoded again from the same manifests, with the encoders and types of the view. Imports
another command, `cache_latents`, for `encode_rows`.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from wanlora.commands.inspect import checks
from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.errors import StoreError, WanloraError
from wanlora.store import commit_records, groups, index, maintenance, schema, storage
from wanlora.store.commit_records import Segment
from wanlora.store.maintenance import Limits
from wanlora.store.views import View, read_view, view_names

log = logging.getLogger(__name__)


EncodeRows = Callable[[View, Mapping[Kind, Collection[str]]], int]
"""Encodes rows of a view, given their keys by kind; returns the number of rows."""


def repair(cache: Location, limits: Limits, encode_rows: EncodeRows) -> dict[str, Any]:
    """Verify in full, drop the bad rows, and encode the rows again that a view then lacks.

    Args:
        cache: Cache folder or URL.
        limits: Maximum size of a segment that is written again.
        encode_rows: Encodes missing rows, for example `encode_from_manifests`.

    Returns:
        dropped: Number of rows. encoded: Number of rows. failures: A line for each part that could
        not be repaired.

    Raises:
        StoreError: The disk or the network refuses; a row that cannot be read is never dropped.
    """
    groups.restore_root(cache)
    storage.at(cache).remove_tree(schema.SNAPSHOTS)  # only the records are used now
    failures = _restore_groups(cache)
    dropped = _drop_damaged_records(cache)
    for kind in schema.KINDS:
        for fingerprint, provenance in index.provenances(cache, kind).items():
            dropped += _drop_bad_rows(cache, kind, fingerprint, provenance, limits)
    encoded = 0
    for name in view_names(cache):
        try:
            encoded += _encode_missing(cache, read_view(cache, name), encode_rows)
        except WanloraError as error:
            failures.append(f"view {name!r}: {error}")
    return {"dropped": dropped, "encoded": encoded, "failures": failures}


def _restore_groups(cache: Location) -> list[str]:
    """Write the documents of groups again, from the provenances that the views have."""
    failures = []
    for name in view_names(cache):
        try:
            view = read_view(cache, name)
        except WanloraError:
            continue  # it becomes a failure when its rows would be encoded
        for kind in view.kinds:
            groups.restore(cache, kind, view.provenance(kind))
    for kind in schema.KINDS:
        for key in groups.damaged(cache, kind):
            storage.at(cache).remove(key)
            failures.append(
                f"{cache / key} was damaged and no view has its content; it was deleted, and "
                "the rows of that encoder cannot be read until cache-latents runs with it again"
            )
    return failures


def _drop_damaged_records(cache: Location) -> int:
    """Drop segments whose commit record cannot be read; each counts as one row."""
    damaged = [
        record
        for kind in schema.KINDS
        for fingerprint in index.provenances(cache, kind)
        for record in commit_records.read_records(cache, kind, fingerprint)
        if isinstance(record, commit_records.Damaged)
    ]
    for record in damaged:
        log.info("dropping %s", record.message)
    if damaged:
        maintenance.drop_segments(cache, [record.key for record in damaged])
    return len(damaged)


def _drop_bad_rows(
    cache: Location, kind: Kind, fingerprint: str, provenance: Mapping[str, Any], limits: Limits
) -> int:
    verdict = checks.full(cache, [(kind, fingerprint)])
    if verdict.unread:
        raise StoreError(
            f"{len(verdict.unread)} rows of "
            f"{cache / schema.fingerprint_key(kind, fingerprint)} could not be read. They "
            f"may be intact, so none was dropped: {verdict.unread[0]}. Run the same command again "
            "when the disk or the network responds"
        )
    bad: dict[str, set[str]] = {}
    for found in verdict.bad:
        bad.setdefault(found.segment, set()).add(found.key or "")
    segments = [
        segment
        for segment in commit_records.read_records(cache, kind, fingerprint, list(bad))
        if isinstance(segment, Segment)
    ]
    keep = {segment.key: set(segment.row_keys) - bad[segment.key] for segment in segments}
    if segments:
        maintenance.keep_only(cache, provenance, segments, keep, limits)
    return sum(len(keys) for keys in bad.values())


def _encode_missing(cache: Location, view: View, encode_rows: EncodeRows) -> int:
    missing = {
        kind: set(index.missing_keys(cache, kind, view.fingerprint(kind), view.keys(kind)))
        for kind in view.kinds
    }
    return encode_rows(view, missing) if any(missing.values()) else 0


def encode_from_manifests(
    view: View,
    missing: Mapping[Kind, Collection[str]],
    *,
    cache: Location,
    limits: Limits,
    manifests: Sequence[Path],
    source_root: Sequence[Path],
    device: str,
) -> int:
    """Run stage one for the given rows of a view; log the clips that could not be encoded.

    Args:
        view: The view.
        missing: Keys of the rows to encode, by kind.
        cache: Cache folder or URL.
        limits: Maximum size of a segment.
        manifests: Paths of the manifests that the view was made from.
        source_root: Folders to search for sources that were moved.
        device: Name of the device.

    Returns:
        Number of rows encoded.

    Raises:
        StoreError: The manifests, the model or the device are not those the view was made with.
    """
    from wanlora.commands import cache_latents  # noqa: PLC0415  (imports diffusers: seconds, only here)

    encoded, failures = cache_latents.encode_rows(
        view,
        missing=missing,
        cache=cache,
        manifests=manifests,
        source_root=source_root,
        device=device,
        rows_per_segment=limits.rows,
        segment_bytes=limits.max_bytes,
    )
    for failure in failures:
        log.warning("[%s] %s: %s", failure.code, failure.clip_id, failure.message)
    return encoded
