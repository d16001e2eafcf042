"""`--repair`: drop what is bad and encode just that again. `--gc`: free what nobody names.

Owns: from a verdict to a whole cache. What is dropped is what no reader could use anyway; what is
encoded again is what stage one would make of the same manifests, with the settings that the view
records.
"""

import logging
import time
from typing import Any

from wanlora.config import CacheLatentsConfig, InspectConfig, StoreSettings
from wanlora.errors import StoreError, WanloraError
from wanlora.inspect_cache import checks
from wanlora.store import index, maintenance, objects, schema
from wanlora.store.maintenance import Generation, Limits
from wanlora.store.views import View, read_view, view_names

log = logging.getLogger(__name__)


def repair(config: InspectConfig) -> dict[str, Any]:
    """Verify in full, drop the bad rows, and encode again what a view then lacks.

    Returns:
        dropped: Rows. encoded: Rows. failures: A line for each view that could not be mended.

    Raises:
        StoreError: The disk or the network refuses; a row that cannot be read is never dropped.
    """
    objects.remove_tree(config.path, schema.SNAPSHOTS)  # what the records say now is what counts
    dropped = _drop_damaged_records(config)
    for generation in maintenance.generations(config.path, ()):
        dropped += _drop_bad_rows(config, generation)
    encoded, failures = 0, []
    for name in view_names(config.path):
        try:
            encoded += _encode_missing(config, read_view(config.path, name))
        except WanloraError as error:
            failures.append(f"view {name!r}: {error}")
    return {"dropped": dropped, "encoded": encoded, "failures": failures}


def gc(config: InspectConfig) -> dict[str, Any]:
    """Free what no view names; with `dry_run`, only say what.

    Raises:
        StoreError: A view or a commit record is damaged (then nobody knows what is named), or there
            is no view at all.
    """
    views = [read_view(config.path, name) for name in view_names(config.path)]
    if not views:
        raise StoreError(
            f"{config.path} has no view, so nothing in it is named and everything would be freed; "
            f"make one with: wanlora cache-latents --cache {config.path}"
        )
    found = maintenance.generations(config.path, views)
    garbage = maintenance.find_garbage(
        config.path, found, now=time.time(), min_age_s=3600 * config.gc_min_age_h
    )
    if not config.dry_run:
        maintenance.collect(config.path, found, garbage, _limits(config))
    return {
        "dry_run": config.dry_run,
        "rows": garbage.rows,
        "repeats": garbage.repeats,
        "young": garbage.young,
        "dropped": len(garbage.dropped),
        "rewritten": len(garbage.rewritten),
        "litter": len(garbage.litter),
        "bytes": garbage.num_bytes,
    }


def _limits(config: InspectConfig) -> Limits:
    return Limits(config.store.clips_per_segment, config.store.segment_bytes)


def _drop_damaged_records(config: InspectConfig) -> int:
    """Drop segments whose commit record cannot be read; each counts as one row at least."""
    dropped = 0
    for kind in schema.KINDS:
        for fingerprint in index.provenances(config.path, kind):
            for record in index.scan(config.path, kind, fingerprint)[1]:
                log.info("dropping %s", record.message)
                maintenance.drop(config.path, record.key)
                dropped += 1
    return dropped


def _drop_bad_rows(config: InspectConfig, generation: Generation) -> int:
    verdict = checks.full(config.path, {generation.kind: generation.segments})
    if verdict.unread:
        raise StoreError(
            f"{len(verdict.unread)} rows of {config.path / generation.key} could not be read, so "
            f"nobody knows whether they are whole, and none was dropped: {verdict.unread[0]}. Run "
            "the same command again once the disk or the network answers"
        )
    bad: dict[str, set[str]] = {}
    for found in verdict.bad:
        bad.setdefault(found.segment, set()).add(found.key or "")
    hit = [segment for segment in generation.segments if segment.key in bad]
    keep = {segment.key: set(segment.row_keys) - bad[segment.key] for segment in hit}
    maintenance.keep_only(config.path, generation, hit, keep, _limits(config))
    return sum(len(keys) for keys in bad.values())


def _encode_missing(config: InspectConfig, view: View) -> int:
    """Run stage one for what a view lacks, and for nothing else.

    Raises:
        StoreError: The manifests, the model or the device are not those the view was made with.
    """
    clips, prompts = _lacking(config, view)
    if not clips and not prompts:
        return 0
    from wanlora import cache_latents  # noqa: PLC0415  (imports diffusers: seconds, only here)

    encoded, failures = cache_latents.encode_rows(
        _stage_one(config, view), view, clips=clips, prompts=prompts
    )
    for failure in failures:
        log.warning("[%s] %s: %s", failure.code, failure.clip_id, failure.message)
    return encoded


def _lacking(config: InspectConfig, view: View) -> tuple[set[str], set[str]]:
    return (
        {c.key for c in view.clips} - index.committed_keys(config.path, "latents", view.latents),
        set(view.prompt_keys()) - index.committed_keys(config.path, "text", view.text),
    )


def _stage_one(config: InspectConfig, view: View) -> CacheLatentsConfig:
    """The settings of stage one that give the view's fingerprints."""
    latents, text = view.latents_provenance, view.text_provenance
    return CacheLatentsConfig(
        manifest=config.manifest,
        cache=config.path,
        model=view.model,
        device=config.device,
        view=view.name,
        vae_dtype=latents["compute_dtype"],
        tf32=latents["tf32"],
        text_dtype=text["compute_dtype"],
        validation_prompts=tuple(prompt.prompt for prompt in view.validation_prompts),
        store=StoreSettings(
            dtype=latents["store_dtype"],
            latent_mantissa_bits=latents.get("mantissa_bits"),
            logvar="logvar" in latents["posterior"],
            clips_per_segment=config.store.clips_per_segment,
            segment_bytes=config.store.segment_bytes,
        ),
    )
