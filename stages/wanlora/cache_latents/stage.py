"""`wanlora cache-latents`: manifests and a model folder to a store and a view.

Owns: the order of stage one. Text first, then clips, the view last; a kill at any point costs at
most a segment, and a second run encodes nothing that is there.
"""

import logging
import shlex
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from wanlora import manifest
from wanlora.cache_latents import encode
from wanlora.cache_latents import plan as planning
from wanlora.cache_latents.encode import EncodedClips
from wanlora.cache_latents.plan import Failure, Hashes, KeyedClip, Plan
from wanlora.config import CacheLatentsConfig
from wanlora.core.fingerprint import fingerprint
from wanlora.errors import ManifestError
from wanlora.files import require_folder
from wanlora.store import objects, schema
from wanlora.store.reader import StoreReader
from wanlora.store.views import View, ViewClip, ViewPrompt, write_view
from wanlora.wan import encoders
from wanlora.wan.device import pick
from wanlora.wan.variants import ENCODERS, MICRO, Variant, resolve, variant_of

SHOWN = 10
"""How many failures are printed; all of them stand in the JSON."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CacheResult:
    """What stage one did; of a dry run, what it would do.

    Attributes:
        clips: Clips in the view.
        clips_encoded: Rows of latents made by this run (of a dry run: to be made).
        clips_cached: Rows of latents that were there.
        duplicate_clips: Clips that share a row with another clip.
        prompts_encoded: Likewise, prompts.
        prompts_cached: Likewise.
        shared_captions: Captions that share a row with another caption.
        encoder_stall: Share of the time that the VAE waited for decoded clips.
        num_bytes: Bytes added to the store (of a dry run: an estimate).
        failures: Clips that are not in the view, and why.
        truncated_prompts: Prompts encoded by this run that lost their end: over 512 tokens.
        changed_sources: Source files that changed after the manifest was written.
    """

    cache: str
    view: str
    view_sha256: str
    dry_run: bool
    clips: int
    clips_encoded: int
    clips_cached: int
    duplicate_clips: int
    prompts_encoded: int
    prompts_cached: int
    shared_captions: int
    num_bytes: int
    seconds: float
    seconds_per_clip: float
    encoder_stall: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    truncated_prompts: list[str] = field(default_factory=list)
    changed_sources: list[str] = field(default_factory=list)
    next_command: str = ""

    @property
    def exit_code(self) -> int:
        """3 when clips failed."""
        return 3 if self.failures else 0

    def lines(self) -> list[str]:
        """What the command prints."""
        verb = "to encode" if self.dry_run else "encoded"
        lines = [
            f"clips:   {self.clips_encoded} {verb}, {self.clips_cached} already there"
            + _saved(self.duplicate_clips, "copies"),
            f"prompts: {self.prompts_encoded} {verb}, {self.prompts_cached} already there"
            + _saved(self.shared_captions, "repeated captions"),
        ]
        if self.dry_run:
            lines.append(f"about {self.num_bytes / 1e6:.2f} MB; nothing was written (--dry-run)")
        else:
            pace = (
                f", {self.seconds_per_clip:.2f} s a clip, encoder waited {self.encoder_stall:.0%}"
                if self.clips_encoded
                else ""
            )
            lines.append(f"{self.num_bytes / 1e6:.2f} MB written in {self.seconds:.1f} s{pace}")
            lines.append(f"view {self.view!r}: {self.clips} clips")
        lines += _listed(
            [f"[{f.code}] {f.clip_id}: {f.message}" for f in self.failures],
            "clips cannot be used, and are not in the view",
        )
        lines += _listed(
            self.truncated_prompts, "prompts have over 512 tokens; their end was cut off"
        )
        lines += _listed(
            self.changed_sources,
            "sources changed after the manifest was written, and were cut as they are now; if "
            "that is not what you want, run wanlora prepare again",
        )
        return lines + ([f"next: {self.next_command}"] if self.next_command else [])


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
    if not plan.clips:
        raise ManifestError(_nothing_left(config, plan.failures))
    planning.note_other_generations(config.cache, plan)
    if config.dry_run:
        return _result(config, plan, seconds=time.monotonic() - started, view_sha256="")
    planning.check_disk(config.cache, plan.num_bytes)
    hashes.write(config.cache)
    before = objects.num_bytes(config.cache, schema.STORE)
    truncated: list[str] = []
    clips = EncodedClips({}, 0.0, 0.0)
    with _stopped_cleanly():
        if plan.missing_prompts:
            truncated = encode.encode_prompts(config, plan, folder=folder, device=device)
        if plan.missing_clips:
            clips = encode.encode_clips(config, plan, folder=folder, variant=variant, device=device)
    undecoded = clips.failures
    kept = [keyed for keyed in plan.clips if keyed.key not in undecoded]
    failures = [*plan.failures, *_failures(plan.clips, undecoded)]
    if not kept:
        raise ManifestError(_nothing_left(config, failures))
    view = _publish(config, plan, kept, folder=folder, variant=variant)
    return _result(
        config,
        plan,
        kept=kept,
        failures=failures,
        undecoded=len(undecoded),
        truncated=truncated,
        view_sha256=view.sha256,
        num_bytes=objects.num_bytes(config.cache, schema.STORE) - before,
        seconds=time.monotonic() - started,
        encoding=clips,
    )


def _publish(
    config: CacheLatentsConfig,
    plan: Plan,
    kept: Sequence[KeyedClip],
    *,
    folder: Path,
    variant: Variant,
) -> View:
    """Write the view, once every row of it is known to be committed."""
    view = View(
        latents=fingerprint(plan.latents_provenance),
        text=fingerprint(plan.text_provenance),
        latents_provenance=plan.latents_provenance,
        text_provenance=plan.text_provenance,
        model=_portable(config.model, folder),
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
    StoreReader.of_view(config.cache, view)
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
    lines = ["no clip of the manifests can be used", *_listed(shown, "clips failed")]
    command = shlex.join(["wanlora", "verify", *map(str, config.manifest)])
    return "\n".join([*lines, f"look at them with: {command}"])


def _result(
    config: CacheLatentsConfig,
    plan: Plan,
    *,
    seconds: float,
    view_sha256: str,
    kept: Sequence[KeyedClip] | None = None,
    failures: Sequence[Failure] | None = None,
    undecoded: int = 0,
    truncated: Sequence[str] = (),
    num_bytes: int | None = None,
    encoding: EncodedClips | None = None,
) -> CacheResult:
    clips = plan.clips if kept is None else kept
    encoded = len(plan.missing_clips) - undecoded
    rows = len({keyed.key for keyed in clips})
    captions = {encoders.prompt_key(text) for k in plan.clips for text in k.clip.prompts}
    return CacheResult(
        cache=str(config.cache),
        view=config.view,
        view_sha256=view_sha256,
        dry_run=config.dry_run,
        clips=len(clips),
        clips_encoded=encoded,
        clips_cached=rows - encoded,
        duplicate_clips=len(clips) - rows,
        prompts_encoded=len(plan.missing_prompts),
        prompts_cached=len(plan.prompts) - len(plan.missing_prompts),
        shared_captions=plan.captions - len(captions),
        num_bytes=plan.num_bytes if num_bytes is None else num_bytes,
        seconds=round(seconds, 3),
        seconds_per_clip=round(encoding.seconds / encoded, 4) if encoding and encoded else 0.0,
        encoder_stall=round(encoding.stall, 4) if encoding else 0.0,
        failures=list(plan.failures if failures is None else failures),
        truncated_prompts=list(truncated),
        changed_sources=list(plan.changed_sources),
        next_command="" if config.dry_run else _next_command(config),
    )


def _next_command(config: CacheLatentsConfig) -> str:
    view = [] if config.view == "default" else ["--view", config.view]
    words = ["wanlora", "train", "--cache", str(config.cache), *view]
    return shlex.join([*words, "--output-dir", "outputs/run"])


def _saved(number: int, what: str) -> str:
    return f" ({number} {what} encoded once)" if number else ""


def _listed(items: Sequence[str], what: str) -> list[str]:
    if not items:
        return []
    more = [f"  ... {len(items) - SHOWN} more (--json lists all)"] if len(items) > SHOWN else []
    return [f"{len(items)} {what}:", *(f"  {item}" for item in items[:SHOWN]), *more]


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
