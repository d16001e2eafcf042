"""`wanlora cache-latents`: manifests and a model folder to a store and a view.

Owns: the order of stage one. Text first, then clips, the view last; a kill at any point costs at
most a segment, and a second run encodes nothing that is there.
"""

import logging
import os
import shlex
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

from wanlora.commands.cache_latents import plan as planning
from wanlora.commands.cache_latents import preflight, processes
from wanlora.commands.cache_latents.encode import complete_groups
from wanlora.commands.cache_latents.hashes import Hashes
from wanlora.commands.cache_latents.plan import Encoders, Failure, KeyedClip, Plan
from wanlora.commands.cache_latents.summary import CacheResult, Outcome, listed, summarize
from wanlora.commands.cache_latents.worker import Encoded, encode_share
from wanlora.config import CacheLatentsConfig
from wanlora.core.prompts import prompt_key
from wanlora.core.units import count, size
from wanlora.data import manifest
from wanlora.data.clip import Clip
from wanlora.data.source_root import advice, find_sources
from wanlora.errors import ConfigError, ManifestError, StoreError
from wanlora.processes.ranks import Rank, rank_of
from wanlora.processes.signals import interrupted_by_signals
from wanlora.store import index, schema, storage, wants
from wanlora.store.reader import StoreReader
from wanlora.store.views import View, ViewClip, ViewPrompt, read_view, view_names, write_view
from wanlora.wan.model_folder import MICRO

log = logging.getLogger(__name__)


def run(
    config: CacheLatentsConfig, found: Sequence[Clip], bad_lines: Sequence[manifest.BadLine]
) -> CacheResult:
    """Encode what the manifests name and the store lacks, and publish the view.

    Args:
        config: The settings.
        found: Clips of the manifests, from `preflight.check`.
        bad_lines: Their lines that cannot be used.

    Raises:
        ManifestError: None of the clips can be used.
        ModelError: The model folder is incomplete, or its weights are wrong.
        DeviceError: The model is too large for what this machine has.
        OutputError: The cache folder cannot be written.
        StoreError: An object of the cache cannot be written, or the disk is too small.
        WorkerError: All workers were killed.
        KeyboardInterrupt: SIGINT or SIGTERM; encoded rows are kept.
    """
    started = time.monotonic()
    rank = rank_of(os.environ)
    found, hashes = _with_hashes(config, found)
    with _launched(config, rank, hashes) as (using, encode_missing):
        shown = rank.index == 0
        plan = planning.make(config, found, using=using, hashes=hashes, shown=shown)
        plan = replace(plan, failures=(*_failures_of(bad_lines), *plan.failures))
        if not plan.clips:
            lost = _advice(config, found, plan.failures)
            raise ManifestError(_nothing_left(config, plan.failures, lost))
        if rank.world > 1:
            _require_videos(plan.failures)
        planning.note_other_generations(config.cache, using)
        if config.dry_run:
            unread, plan = plan.unread, planning.look(config, plan)
            _require_some_sources(config, found, plan, unread)
            outcome = Outcome(plan.clips, plan.failures, num_bytes=plan.num_bytes)
            seconds = time.monotonic() - started
            return summarize(config, plan, outcome, seconds=seconds, shown=shown)
        before = storage.num_bytes(config.cache, schema.STORE)
        earlier = wants.names(config.cache, config.view)
        wanted = wants.publish(config.cache, _view(config, plan, plan.clips))
        unread, plan = plan.unread, planning.look(config, plan)
        if rank.world > 1:
            _require_videos([failure for failure in unread if failure not in plan.unread])
        _require_some_sources(config, found, plan, unread)
        if shown:
            log.info(
                "to encode: %s and %s, about %s, into %s; already there: %s and %s",
                count(len(plan.missing_clips), "clip"),
                count(len(plan.missing_prompts), "prompt"), size(plan.num_bytes), config.cache,
                count(len({keyed.key for keyed in plan.clips}) - len(plan.missing_clips), "clip"),
                count(len(plan.prompts) - len(plan.missing_prompts), "prompt"),
            )  # fmt: skip
        made = _encode(config, plan, hashes, encode_missing)
    kept = [keyed for keyed in plan.clips if keyed.key not in made.clips.failures]
    failures = [*plan.failures, *_failures(plan.clips, made.clips.failures)]
    if not kept:
        raise ManifestError(_nothing_left(config, failures))
    stays = _as_before(config, plan, found, failures)
    view = _publish(config, plan, kept, stays)
    wants.drop(config.cache, {wanted, *earlier})
    added = storage.num_bytes(config.cache, schema.STORE) - before
    outcome = Outcome(kept, failures, stays, added, view.sha256, made)
    return summarize(config, plan, outcome, seconds=time.monotonic() - started, shown=shown)


def _require_videos(failures: Sequence[Failure]) -> None:
    """Refuse a machine that lacks videos which others may have: it would publish a smaller view.

    Raises:
        ManifestError: Names the machine and what it lacks.
    """
    lacking = [f.message for f in failures if f.code in ("missing", "unreadable")]
    if lacking:
        raise ManifestError(
            "\n".join(
                [
                    f"{socket.gethostname()} lacks {len(lacking)} clips' videos, and another "
                    "machine may have them; mount them under the same path, or take them out of "
                    "the manifest:",
                    *listed(lacking, "clip", "without a video here"),
                ]
            )
        )


def encode_rows(
    config: CacheLatentsConfig, view: View, *, clips: Collection[str], prompts: Collection[str]
) -> tuple[int, list[Failure]]:
    """Encode again what the store has lost of a view; the view stays as it is.

    Other clips of the manifests are left alone, whether they can be used or not.

    Args:
        config: Manifests, and the settings that the view was made with.
        view: The view.
        clips: Keys of its clips to encode.
        prompts: Keys of its prompts to encode.

    Returns:
        Number of rows encoded, and the clips that could not be. Rows that the manifests do not name
        are in neither, and in the log.

    Raises:
        StoreError: The manifests, the model or the device give none of these rows.
    """
    found, _ = preflight.check(config)
    found, hashes = _with_hashes(config, found)
    using = planning.encoders_here(config, hashes)
    all_of_it = planning.look(config, planning.make(config, found, using=using, hashes=hashes))
    missing_clips = tuple(keyed for keyed in all_of_it.missing_clips if keyed.key in clips)
    missing_prompts = {k: t for k, t in all_of_it.missing_prompts.items() if k in prompts}
    named = (
        f"of the {len(clips)} clips and {len(prompts)} prompts that it lacks, "
        f"{', '.join(map(str, config.manifest))} names {len(missing_clips)} and "
        f"{len(missing_prompts)}"
    )
    others = (clips and all_of_it.fingerprint("latents") != view.latents) or (
        prompts and all_of_it.fingerprint("text") != view.text
    )
    num_rows = len(missing_clips) + len(missing_prompts)
    if others or not num_rows:
        raise StoreError(
            f"{named}{', for another encoder' if others else ''}: the manifests, the model or the "
            "device are not those it was made with. Give them with --manifest and --device, or "
            f"make the view again: wanlora cache-latents --cache {config.cache} --view {view.name}"
        )
    if num_rows < len(clips) + len(prompts):
        log.warning("view %r: %s; these are encoded", view.name, named)
    plan = replace(all_of_it, missing_clips=missing_clips, missing_prompts=missing_prompts)
    made = _encode(config, plan, hashes, partial(encode_share, config))
    failures = _failures(missing_clips, made.clips.failures)
    return num_rows - len(failures), failures


def _with_hashes(config: CacheLatentsConfig, found: Sequence[Clip]) -> tuple[list[Clip], Hashes]:
    """Find sources that were moved, and read the known hashes of all sources."""
    hashes = Hashes.read(config.cache, config.manifest)
    clips, moved = find_sources(found, config.source_root)
    hashes.move_sources(moved)
    return clips, hashes


def _failures_of(bad: Sequence[manifest.BadLine]) -> list[Failure]:
    """A failure for each line of a manifest that cannot be used."""
    return [Failure("bad_line", line.where, line.reason) for line in bad]


@contextmanager
def _launched(
    config: CacheLatentsConfig, rank: Rank, hashes: Hashes
) -> Iterator[tuple[Encoders, Callable[[Plan], Encoded]]]:
    """The encoders of the workers, and what has them encode a plan.

    Raises:
        ConfigError: Ray is not installed.
    """
    if config.launcher == "ray":
        with _on_ray().workers(config) as workers:
            yield workers.using, workers.encode
        return
    using = planning.encoders_here(config, hashes, local_rank=rank.local)

    def encode_missing(plan: Plan) -> Encoded:
        num_workers = processes.how_many(config, plan) if rank.world == 1 else 1
        if num_workers > 1:
            return processes.encode(config, plan, num_workers=num_workers)
        return encode_share(config, plan, rank)

    yield using, encode_missing


def _on_ray() -> ModuleType:
    """Import what needs Ray.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        from wanlora.commands.cache_latents import on_ray  # noqa: PLC0415  (an extra, and slow to import)
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError("--launcher ray needs Ray: pip install 'wanlora[ray]'") from None
    return on_ray


def _encode(
    config: CacheLatentsConfig,
    plan: Plan,
    hashes: Hashes,
    encode_missing: Callable[[Plan], Encoded],
) -> Encoded:
    planning.check_disk(config.cache, plan.num_bytes)
    hashes.write_sources(config.cache)
    with interrupted_by_signals():
        try:
            return encode_missing(plan)
        except KeyboardInterrupt:
            log.warning("stopped; encoded rows are kept. To continue, run the same command")
            raise


def _as_before(
    config: CacheLatentsConfig, plan: Plan, found: Sequence[Clip], failures: Sequence[Failure]
) -> list[ViewClip]:
    """Clips that fail now and are in the view that will be replaced: they stay as they are in it.

    A disk that does not answer for a moment would otherwise make the view smaller.
    """
    ids = {failure.clip_id for failure in failures}
    clips = {clip.clip_id: clip for clip in found if clip.clip_id in ids}
    if not clips or config.view not in view_names(config.cache):
        return []
    try:
        view = read_view(config.cache, config.view)
    except StoreError as error:
        log.warning("the view that is replaced cannot be read: %s", error)
        return []
    latents, text = plan.fingerprint("latents"), plan.fingerprint("text")
    if (view.latents, view.text) != (latents, text):
        return []
    stays = [old for old in view.clips if old.clip_id in clips]
    keys = [old.key for old in stays]
    gone = set(index.missing_keys(config.cache, "latents", latents, keys))
    prompts = {key for old in stays for key in old.prompts}
    gone |= set(index.missing_keys(config.cache, "text", text, prompts))
    return [
        replace(
            old, activity=now.activity, split=now.split, source_group=now.source_group,
            weight=now.weight,
        )
        for old in stays
        if gone.isdisjoint({old.key, *old.prompts}) and (now := clips[old.clip_id])
    ]  # fmt: skip


def _publish(
    config: CacheLatentsConfig, plan: Plan, kept: Sequence[KeyedClip], stays: Sequence[ViewClip]
) -> View:
    """Write the view, once every row of it is known to be committed."""
    view = _view(config, plan, kept)
    view = replace(view, clips=(*stays, *view.clips))
    complete_groups(config.cache, plan.using, kept)
    reader = StoreReader.of_view(config.cache, view)
    written = write_view(config.cache, config.view, view)
    try:
        reader.keep_index()
    except StoreError as error:  # it would only have saved time
        log.warning("the index is not kept: %s", error)
    return written


def _view(config: CacheLatentsConfig, plan: Plan, clips: Sequence[KeyedClip]) -> View:
    using, variant = plan.using, plan.using.variant
    return View(
        latents=plan.fingerprint("latents"),
        text=plan.fingerprint("text"),
        latents_provenance=using.latents_provenance,
        text_provenance=using.text_provenance,
        model=_portable(config.model, using.folder),
        variant=variant.name,
        shift=variant.shift,
        empty_prompt=prompt_key(""),
        negative_prompt=prompt_key(variant.negative_prompt),
        validation_prompts=tuple(
            ViewPrompt(text, prompt_key(text)) for text in config.validation_prompts
        ),
        clips=tuple(
            ViewClip(
                clip_id=keyed.clip.clip_id,
                key=keyed.key,
                bucket=keyed.clip.bucket,
                prompts=tuple(prompt_key(text) for text in keyed.clip.prompts),
                activity=keyed.clip.activity,
                split=keyed.clip.split,
                source_group=keyed.clip.source_group,
                fps=keyed.clip.fps,
                weight=keyed.clip.weight,
            )
            for keyed in clips
        ),
        name=config.view,
    )


def _portable(model: str, folder: Path) -> str:
    """Name of the model that means the same from any working directory."""
    return str(folder) if model != MICRO and Path(model).expanduser().is_dir() else model


def _failures(clips: Sequence[KeyedClip], undecoded: Mapping[str, Failure]) -> list[Failure]:
    """One failure for every clip that wanted a row which could not be made."""
    return [
        Failure(undecoded[keyed.key].code, keyed.clip.clip_id, undecoded[keyed.key].message)
        for keyed in clips
        if keyed.key in undecoded
    ]


def _require_some_sources(
    config: CacheLatentsConfig, found: Sequence[Clip], plan: Plan, unread: Sequence[Failure]
) -> None:
    """Log what to do about sources that are missing; refuse if no clip can be encoded without them.

    Args:
        config: The settings.
        found: Clips of the manifests.
        plan: After `look`: clips with rows in the store need no source.
        unread: Clips without a readable source, before `look`.

    Raises:
        ManifestError: Every clip lacks both its source and its row.
    """
    failures = [failure for failure in unread if failure not in plan.unread]
    lost = _advice(config, found, [*plan.failures, *failures])
    if lost and len(failures) == len(plan.clips):
        raise ManifestError(_nothing_left(config, [*plan.failures, *failures], lost))
    if lost:
        log.warning("%s", lost)


def _advice(config: CacheLatentsConfig, found: Sequence[Clip], failures: Sequence[Failure]) -> str:
    """Explain what to do about sources that are missing; empty without any."""
    lost = {failure.clip_id for failure in failures if failure.code == "missing"}
    return advice(
        (clip.source for clip in found if clip.clip_id in lost),
        len({clip.path for clip in found}),
        config.source_root,
    )


def _nothing_left(config: CacheLatentsConfig, failures: Sequence[Failure], lost: str = "") -> str:
    shown = [f"[{f.code}] {f.clip_id}: {f.message}" for f in failures]
    lines = ["no clip of the manifests can be used", *listed(shown, "clip", "failed")]
    if lost:
        return "\n".join([*lines, lost])
    command = shlex.join(["wanlora", "verify", *map(str, config.manifest)])
    return "\n".join([*lines, f"look at them with: {command}"])
