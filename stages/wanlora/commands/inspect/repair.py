"""`--repair`: drop bad rows and encode only those again. `--gc`: free what nothing names.

Owns: from a verdict to a whole cache. Only rows that no reader could use are dropped; they are
encoded again as stage one would from the same manifests, with the settings in the view.
"""

import logging
import time
from collections.abc import Mapping
from typing import Any

from wanlora.commands.inspect import checks
from wanlora.config import InspectConfig
from wanlora.errors import StoreError, WanloraError
from wanlora.store import commit_records, groups, index, maintenance, schema, storage, wants
from wanlora.store.commit_records import Segment
from wanlora.store.maintenance import Limits
from wanlora.store.schema import Kind
from wanlora.store.views import View, read_view, view_names

log = logging.getLogger(__name__)


def repair(config: InspectConfig) -> dict[str, Any]:
    """Verify in full, drop the bad rows, and encode again what a view then lacks.

    Returns:
        dropped: Number of rows. encoded: Number of rows. failures: A line for each part that could
        not be repaired.

    Raises:
        StoreError: The disk or the network refuses; a row that cannot be read is never dropped.
    """
    groups.restore_root(config.path)
    storage.at(config.path).remove_tree(schema.SNAPSHOTS)  # only the records count now
    failures = _restore_groups(config)
    dropped = _drop_damaged_records(config)
    for kind in schema.KINDS:
        for fingerprint, provenance in index.provenances(config.path, kind).items():
            dropped += _drop_bad_rows(config, kind, fingerprint, provenance)
    encoded = 0
    for name in view_names(config.path):
        try:
            encoded += _encode_missing(config, read_view(config.path, name))
        except WanloraError as error:
            failures.append(f"view {name!r}: {error}")
    return {"dropped": dropped, "encoded": encoded, "failures": failures}


def gc(config: InspectConfig) -> dict[str, Any]:
    """Free what no view and no unfinished run names; with `dry_run`, only count it.

    Raises:
        StoreError: A view, a list of wants or a commit record is damaged (then the rows to keep are
            not known), nothing names any row, or another collection runs.
    """
    cache, listed = config.path, wants.names(config.path)
    if unknown := sorted(set(config.gc_drop_wants) - set(listed)):
        raise StoreError(
            f"gc_drop_wants: {cache} has no unfinished run {', '.join(unknown)} (there are: "
            f"{', '.join(listed) or 'none'})"
        )
    kept = [name for name in listed if name not in config.gc_drop_wants]
    if not kept and not view_names(cache):
        raise StoreError(
            f"{cache} has no view, so nothing in it is named and everything would be freed; "
            f"make one with: wanlora cache-latents --cache {cache}"
        )

    def named() -> wants.Named:
        return wants.named_rows(cache, ignored=config.gc_drop_wants)

    found = maintenance.generations(cache, named())
    now = time.time() if config.dry_run else storage.at(cache).clock()
    garbage = maintenance.find_garbage(cache, found, now=now, min_age_s=3600 * config.gc_min_age_h)
    if not config.dry_run:
        maintenance.collect(cache, found, garbage, _limits(config), named_now=named)
        wants.drop(cache, config.gc_drop_wants)
    return {
        "dry_run": config.dry_run,
        "rows": garbage.rows,
        "repeats": garbage.repeats,
        "young": garbage.young,
        "dropped": len(garbage.dropped),
        "rewritten": len(garbage.rewritten),
        "litter": len(garbage.litter) + len(garbage.emptied),
        "bytes": garbage.num_bytes,
        "wants": kept,
    }


def _limits(config: InspectConfig) -> Limits:
    return Limits(config.store.clips_per_segment, config.store.segment_bytes)


def _restore_groups(config: InspectConfig) -> list[str]:
    """Write the documents of groups again, from the provenances that the views have."""
    failures = []
    for name in view_names(config.path):
        try:
            view = read_view(config.path, name)
        except WanloraError:
            continue  # it is listed as a failure where its rows would be encoded
        groups.restore(config.path, "latents", view.latents_provenance)
        groups.restore(config.path, "text", view.text_provenance)
    for kind in schema.KINDS:
        for key in groups.damaged(config.path, kind):
            storage.at(config.path).remove(key)
            failures.append(
                f"{config.path / key} was damaged and no view has its content; it was deleted, and "
                "the rows of that encoder cannot be read until cache-latents runs with it again"
            )
    return failures


def _drop_damaged_records(config: InspectConfig) -> int:
    """Drop segments whose commit record cannot be read; each counts as one row."""
    damaged = [
        record
        for kind in schema.KINDS
        for fingerprint in index.provenances(config.path, kind)
        for record in commit_records.read_records(config.path, kind, fingerprint)
        if isinstance(record, commit_records.Damaged)
    ]
    for record in damaged:
        log.info("dropping %s", record.message)
    if damaged:
        maintenance.drop_segments(config.path, [record.key for record in damaged])
    return len(damaged)


def _drop_bad_rows(
    config: InspectConfig, kind: Kind, fingerprint: str, provenance: Mapping[str, Any]
) -> int:
    verdict = checks.full(config.path, [(kind, fingerprint)])
    if verdict.unread:
        raise StoreError(
            f"{len(verdict.unread)} rows of "
            f"{config.path / schema.fingerprint_key(kind, fingerprint)} could not be read, so they "
            f"may be whole, and none was dropped: {verdict.unread[0]}. Run the same command again "
            "once the disk or the network answers"
        )
    bad: dict[str, set[str]] = {}
    for found in verdict.bad:
        bad.setdefault(found.segment, set()).add(found.key or "")
    segments = [
        segment
        for segment in commit_records.read_records(config.path, kind, fingerprint, list(bad))
        if isinstance(segment, Segment)
    ]
    keep = {segment.key: set(segment.row_keys) - bad[segment.key] for segment in segments}
    if segments:
        maintenance.keep_only(config.path, provenance, segments, keep, _limits(config))
    return sum(len(keys) for keys in bad.values())


def _encode_missing(config: InspectConfig, view: View) -> int:
    """Run stage one for what a view lacks, and for nothing else.

    Raises:
        StoreError: The manifests, the model or the device are not those the view was made with.
    """
    clips, prompts = _lacking(config, view)
    if not clips and not prompts:
        return 0
    from wanlora.commands import cache_latents  # noqa: PLC0415  (imports diffusers: seconds, only here)

    encoded, failures = cache_latents.encode_rows(
        view,
        clips=clips,
        prompts=prompts,
        cache=config.path,
        manifests=config.manifest,
        source_root=config.source_root,
        device=config.device,
        rows_per_segment=config.store.clips_per_segment,
        segment_bytes=config.store.segment_bytes,
    )
    for failure in failures:
        log.warning("[%s] %s: %s", failure.code, failure.clip_id, failure.message)
    return encoded


def _lacking(config: InspectConfig, view: View) -> tuple[set[str], set[str]]:
    clips = [clip.key for clip in view.clips]
    return (
        set(index.missing_keys(config.path, "latents", view.latents, clips)),
        set(index.missing_keys(config.path, "text", view.text, view.prompt_keys())),
    )
