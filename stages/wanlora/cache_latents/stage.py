"""`wanlora cache-latents`: manifests and a model folder to a store and a view.

Owns: the order of stage one. Text first, then clips, the view last; a kill at any point costs at
most a segment, and a second run encodes nothing that is there.
"""

import logging
import shlex
import signal
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch

from wanlora import manifest
from wanlora.cache_latents import encode
from wanlora.cache_latents import plan as planning
from wanlora.cache_latents.encode import EncodedClips
from wanlora.cache_latents.plan import Failure, Hashes, KeyedClip, Plan
from wanlora.cache_latents.result import CacheResult, Outcome, listed, summarize
from wanlora.config import CacheLatentsConfig
from wanlora.core.fingerprint import fingerprint
from wanlora.errors import ManifestError, StoreError
from wanlora.files import require_folder
from wanlora.store import objects, schema
from wanlora.store.reader import StoreReader
from wanlora.store.views import View, ViewClip, ViewPrompt, write_view
from wanlora.wan import encoders
from wanlora.wan.device import pick
from wanlora.wan.variants import ENCODERS, MICRO, Variant, resolve, variant_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """A plan, and what it takes to carry it out."""

    plan: Plan
    folder: Path
    variant: Variant
    device: torch.device
    hashes: Hashes


def run(config: CacheLatentsConfig) -> CacheResult:
    """Encode what the manifests name and the store lacks, and publish the view.

    Raises:
        ManifestError: A manifest cannot be used, or none of its clips can.
        ModelError: The model folder is incomplete, or its weights are wrong.
        DeviceError: The model is too large for what this machine has.
        OutputError: The cache folder cannot be written.
        StoreError: An object of the cache cannot be written, or the disk is too small.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what was encoded is kept.
    """
    started = time.monotonic()
    job = _plan(config)
    plan = job.plan
    if not plan.clips:
        raise ManifestError(_nothing_left(config, plan.failures))
    planning.note_other_generations(config.cache, plan)
    if config.dry_run:
        outcome = Outcome(plan.clips, plan.failures, plan.num_bytes)
        return summarize(config, plan, outcome, seconds=time.monotonic() - started)
    before = objects.num_bytes(config.cache, schema.STORE)
    truncated, encoding = _encode(config, job)
    kept = [keyed for keyed in plan.clips if keyed.key not in encoding.failures]
    failures = [*plan.failures, *_failures(plan.clips, encoding.failures)]
    if not kept:
        raise ManifestError(_nothing_left(config, failures))
    view = _publish(config, job, kept)
    added = objects.num_bytes(config.cache, schema.STORE) - before
    outcome = Outcome(kept, failures, added, view.sha256, truncated, encoding)
    return summarize(config, plan, outcome, seconds=time.monotonic() - started)


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
    job = _plan(config)
    missing_clips = tuple(keyed for keyed in job.plan.missing_clips if keyed.key in clips)
    missing_prompts = {k: t for k, t in job.plan.missing_prompts.items() if k in prompts}
    named = (
        f"of the {len(clips)} clips and {len(prompts)} prompts that it lacks, "
        f"{', '.join(map(str, config.manifest))} names {len(missing_clips)} and "
        f"{len(missing_prompts)}"
    )
    others = (clips and fingerprint(job.plan.latents_provenance) != view.latents) or (
        prompts and fingerprint(job.plan.text_provenance) != view.text
    )
    found = len(missing_clips) + len(missing_prompts)
    if others or not found:
        raise StoreError(
            f"{named}{', for another encoder' if others else ''}: the manifests, the model or the "
            "device are not those it was made with. Give them with --manifest and --device, or "
            f"make the view anew: wanlora cache-latents --cache {config.cache} --view {view.name}"
        )
    if found < len(clips) + len(prompts):
        log.warning("view %r: %s; these are encoded", view.name, named)
    plan = replace(job.plan, missing_clips=missing_clips, missing_prompts=missing_prompts)
    _, encoding = _encode(config, replace(job, plan=plan))
    failures = _failures(missing_clips, encoding.failures)
    return found - len(failures), failures


def _plan(config: CacheLatentsConfig) -> Job:
    """Find out what there is to encode; writes nothing to the cache."""
    if isinstance(config.cache, Path):
        require_folder(config.cache, flag="--cache")
    found = manifest.read_all(config.manifest)  # before a model is downloaded
    device = pick(config.device, config.model)
    folder = resolve(config.model, ENCODERS)
    variant = variant_of(folder)
    hashes = Hashes.read(config.cache)
    plan = planning.make(
        config, found, folder=folder, variant=variant, device=device, hashes=hashes
    )
    return Job(plan, folder, variant, device, hashes)


def _encode(config: CacheLatentsConfig, job: Job) -> tuple[list[str], EncodedClips]:
    """Encode what is missing; also returns the prompts that lost their end."""
    plan, folder, device = job.plan, job.folder, job.device
    planning.check_disk(config.cache, plan.num_bytes)
    job.hashes.write_sources(config.cache)
    truncated: list[str] = []
    clips = encode.NOTHING
    with _stopped_cleanly():
        if plan.missing_prompts:
            truncated = encode.encode_prompts(config, plan, folder=folder, device=device)
        if plan.missing_clips:
            clips = encode.encode_clips(
                config, plan, folder=folder, variant=job.variant, device=device
            )
    return truncated, clips


def _publish(config: CacheLatentsConfig, job: Job, kept: Sequence[KeyedClip]) -> View:
    """Write the view, once every row of it is known to be committed."""
    plan, variant = job.plan, job.variant
    view = View(
        latents=fingerprint(plan.latents_provenance),
        text=fingerprint(plan.text_provenance),
        latents_provenance=plan.latents_provenance,
        text_provenance=plan.text_provenance,
        model=_portable(config.model, job.folder),
        variant=variant.name,
        shift=variant.shift,
        empty_prompt=encoders.prompt_key(""),
        negative_prompt=encoders.prompt_key(variant.negative_prompt),
        validation_prompts=tuple(
            ViewPrompt(encoders.clean_prompt(text), encoders.prompt_key(text))
            for text in config.validation_prompts
        ),
        clips=tuple(
            ViewClip(
                clip_id=keyed.clip.clip_id,
                key=keyed.key,
                bucket=keyed.clip.bucket,
                prompts=tuple(encoders.prompt_key(text) for text in keyed.clip.prompts),
                activity=keyed.clip.activity,
                split=keyed.clip.split,
                source_group=keyed.clip.source_group,
            )
            for keyed in kept
        ),
        name=config.view,
    )
    encode.complete_groups(config.cache, plan, kept)
    StoreReader.of_view(config.cache, view).keep_index()
    return write_view(config.cache, config.view, view)


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


def _nothing_left(config: CacheLatentsConfig, failures: Sequence[Failure]) -> str:
    shown = [f"[{f.code}] {f.clip_id}: {f.message}" for f in failures]
    lines = ["no clip of the manifests can be used", *listed(shown, "clips failed")]
    command = shlex.join(["wanlora", "verify", *map(str, config.manifest)])
    return "\n".join([*lines, f"look at them with: {command}"])


@contextmanager
def _stopped_cleanly() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that a scheduler's stop publishes what is encoded."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may catch signals
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        log.warning("stopped; what was encoded is kept, and the same command goes on from there")
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
