"""`wanlora cache-latents`: manifests and a model folder to a store and a view.

Owns: the order of stage one: text first, then clips, the view last. A kill loses at most one
segment, and a second run encodes only missing rows.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from wanlora.commands.cache_latents import encode_settings
from wanlora.commands.cache_latents import plan as planning
from wanlora.commands.cache_latents.clip_keys import Failure, failures_of
from wanlora.commands.cache_latents.find_encoders import log_other_generations
from wanlora.commands.cache_latents.launch import encode_missing, launched
from wanlora.commands.cache_latents.plan import Plan
from wanlora.commands.cache_latents.publish import (
    make_view,
    publish,
    unchanged_clips,
    warn_of_replaced_view,
)
from wanlora.commands.cache_latents.sources import (
    find_moved_sources,
    no_usable_clip,
    require_some_sources,
    require_usable_clips,
    require_videos,
)
from wanlora.commands.cache_latents.summary import CacheResult, Outcome, summarize
from wanlora.config import CacheLatentsConfig
from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.core.units import count, size
from wanlora.data import manifest
from wanlora.data.clip import Clip
from wanlora.processes.ranks import ALONE, Rank, rank_of
from wanlora.store import schema, storage, wants

log = logging.getLogger(__name__)


def run(
    config: CacheLatentsConfig, clips: Sequence[Clip], bad_lines: Sequence[manifest.BadLine]
) -> CacheResult:
    """Encode the rows that the manifests need and the store lacks, and publish the view.

    Args:
        config: The settings.
        clips: Clips of the manifests, from `preflight.check`.
        bad_lines: Lines of the manifests that cannot be used.

    Raises:
        ManifestError: None of the clips can be used.
        ModelError: The model folder is incomplete, or its weights are wrong.
        DeviceError: The model is too large for the memory of this machine.
        OutputError: The cache folder cannot be written.
        StoreError: An object of the cache cannot be written, or the disk is too small.
        WorkerError: All workers were killed.
        KeyboardInterrupt: SIGINT or SIGTERM; encoded rows are kept.
    """
    started, rank, cache = time.monotonic(), rank_of(os.environ), config.cache
    manifests, roots, shown = config.manifest, config.source_root, rank.index == 0
    clips, hashes = find_moved_sources(clips, cache=cache, manifests=manifests, roots=roots)
    view_of = partial(
        make_view, config.view, model=config.model, validation_prompts=config.validation_prompts
    )
    result_of = partial(
        summarize, cache=cache, view=config.view, manifests=manifests, started=started, shown=shown
    )
    with launched(
        encode_settings.of_config(config), hashes, rank, launcher=config.launcher,
        num_workers=config.num_workers, gpus_per_worker=config.gpus_per_worker,
        timeout_s=config.worker_timeout_s, dry_run=config.dry_run,
    ) as (encoders, encode_plan):  # fmt: skip
        plan = planning.make_plan(
            clips, cache=cache, encoders=encoders, hashes=hashes, shown=shown,
            more_prompts=config.validation_prompts, threads=config.decode_workers,
        )  # fmt: skip
        plan = replace(plan, failures=(*_failures_of(bad_lines), *plan.failures))
        require_usable_clips(clips, plan, manifests, roots)
        require_videos(plan.failures, rank)
        log_other_generations(cache, encoders)
        if shown:
            warn_of_replaced_view(cache, view_of(plan, ()))
        if config.dry_run:
            plan = _find_missing(cache, plan, clips, roots)
            return result_of(plan, Outcome(plan.clips, plan.failures, num_bytes=plan.num_bytes))
        size_before = storage.num_bytes(cache, schema.STORE)
        earlier_wants = wants.names(cache, config.view)
        own_wants = wants.publish(cache, view_of(plan, plan.clips))
        plan = _find_missing(cache, plan, clips, roots, rank)
        if shown:
            _log_plan(cache, plan)
        encoded = encode_missing(cache, plan, hashes, encode_plan)
    usable = [keyed for keyed in plan.clips if keyed.key not in encoded.failures]
    failures = [*plan.failures, *failures_of(plan.clips, encoded.failures)]
    if not usable:
        raise no_usable_clip(failures, manifests)
    unchanged = unchanged_clips(cache, config.view, plan, clips, failures)
    view = publish(cache, view_of(plan, usable), plan, usable, unchanged)
    wants.drop(cache, {own_wants, *earlier_wants})
    added = storage.num_bytes(cache, schema.STORE) - size_before
    return result_of(plan, Outcome(usable, failures, unchanged, added, view.sha256, encoded))


def _failures_of(bad_lines: Sequence[manifest.BadLine]) -> list[Failure]:
    """Return a failure for each line of a manifest that cannot be used."""
    return [Failure("bad_line", line.where, line.reason) for line in bad_lines]


def _find_missing(
    cache: Location, plan: Plan, clips: Sequence[Clip], roots: Sequence[Path], rank: Rank = ALONE
) -> Plan:
    """Find the rows that are not committed, and refuse a plan whose missing clips have no sources.

    Raises:
        ManifestError: No clip can be encoded, or this is one of several ranks and another machine
            may have a source.
    """
    unread, plan = plan.unread, planning.find_missing(cache, plan)
    require_videos([failure for failure in unread if failure not in plan.unread], rank)
    require_some_sources(clips, plan, unread, roots)
    return plan


def _log_plan(cache: Location, plan: Plan) -> None:
    num_clips = len({keyed.key for keyed in plan.clips})
    missing = {kind: len(keys) for kind, keys in plan.missing_keys.items()}
    log.info(
        "to encode: %s, about %s, into %s; already there: %s",
        _counts(missing), size(plan.num_bytes), cache,
        _counts({
            kind: (len(plan.prompts) if kind == "text" else num_clips) - number
            for kind, number in missing.items()
        }),
    )  # fmt: skip


def _counts(rows: Mapping[Kind, int]) -> str:
    """Format the numbers of rows, by kind."""
    nouns = {kind: "prompt" if kind == "text" else "clip" for kind in rows}
    return ", ".join(f"{kind} of {count(number, nouns[kind])}" for kind, number in rows.items())
