"""Result of `wanlora cache-latents`.

Owns: the counts of a run, and those that a dry run predicts. Encodes nothing.
"""

import shlex
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wanlora.commands.cache_latents.clip_keys import Failure, KeyedClip
from wanlora.commands.cache_latents.plan import Plan
from wanlora.commands.cache_latents.worker import Encoded
from wanlora.core.location import Location
from wanlora.core.prompts import prompt_key
from wanlora.core.shares import describe_shares, shares
from wanlora.core.text import shorten
from wanlora.core.units import JSON, count, duration, first, percent, size
from wanlora.data.clip import TRAIN
from wanlora.data.edits import unused_captions
from wanlora.store.views import ViewClip
from wanlora.wan.variants import Variant


@dataclass(frozen=True, slots=True)
class CacheResult:
    """Result of stage one; of a dry run, the predicted result.

    Attributes:
        clips: Clips in the view.
        clips_encoded: Rows of latents that all workers of this run made (of a dry run: will make).
        clips_cached: Rows of latents that were there before.
        duplicate_clips: Clips that share a row with another clip.
        prompts_encoded: Rows of prompt embeddings that this run made.
        prompts_cached: Rows of prompt embeddings that were there before.
        shared_captions: Captions that share a row with another caption.
        workers: Processes or actors that encoded.
        clips_encoded_twice: Superfluous copies of rows of clips that several workers made.
        encoder_stall: Share of the time that the encoder waited for decoded clips.
        rows: Rows by kind: encoded, cached, and the bytes of the encoded ones (an estimate).
        num_bytes: Bytes added to the store (of a dry run: an estimate).
        failures: Clips that are not in the view, with the reason.
        kept: Clips that cannot be used now and stay in the view unchanged, with the reason.
        unread: Clips in the view whose sources cannot be read now; their rows are there.
        bytes_hashed: Bytes of sources that were read to hash them.
        truncated_prompts: Prompts of over 512 tokens that this run encoded; they were cut.
        changed_sources: Source files that changed after the manifest was written.
        unused_captions: Caption files that were edited after `prepare` read them.
        captions_command: Command that reads them.
        draws: Expected share of the clips drawn in training, by activity; 0 to 1.
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
    rows: dict[str, dict[str, int]]
    num_bytes: int
    seconds: float
    seconds_per_clip: float
    encoder_stall: float = 0.0
    workers: int = 1
    clips_encoded_twice: int = 0
    bytes_hashed: int = 0
    failures: list[Failure] = field(default_factory=list)
    kept: list[Failure] = field(default_factory=list)
    unread: list[Failure] = field(default_factory=list)
    truncated_prompts: list[str] = field(default_factory=list)
    changed_sources: list[str] = field(default_factory=list)
    unused_captions: list[str] = field(default_factory=list)
    captions_command: str = ""
    draws: dict[str, float] = field(default_factory=dict)
    next_command: str = ""

    @property
    def exit_code(self) -> int:
        """3 when clips failed."""
        return 3 if self.failures or self.kept else 0

    def lines(self) -> list[str]:
        """Format the result."""
        verb = "to encode" if self.dry_run else "encoded"
        lines = [
            f"clips:   {self.clips_encoded:,} {verb}, {self.clips_cached:,} already there"
            + _saved(self.duplicate_clips, "copy", "copies"),
            f"prompts: {self.prompts_encoded:,} {verb}, {self.prompts_cached:,} already there"
            + _saved(self.shared_captions, "repeated caption"),
            *(
                f"{kind}: {rows['encoded']:,} {verb}, {rows['cached']:,} already there"
                for kind, rows in self.rows.items()
                if kind not in ("latents", "text")
            ),
        ]
        if self.dry_run and len(self.draws) > 1:
            lines.append(f"expected share of draws: {describe_shares(self.draws)}")
        if self.workers > 1:
            twice = count(self.clips_encoded_twice, "clip")
            lines.append(f"{self.workers} workers; {twice} encoded twice")
        if self.dry_run:
            lines.append(f"about {size(self.num_bytes)}; nothing was written (--dry-run)")
        else:
            pace = (
                f", {duration(self.seconds_per_clip)} per clip, encoder waited "
                f"{percent(self.encoder_stall)}"
                if self.seconds_per_clip
                else ""
            )
            lines.append(f"{size(self.num_bytes)} written in {duration(self.seconds)}{pace}")
            lines.append(f"view {self.view!r}: {count(self.clips, 'clip')}")
        lines += listed(_texts(self.failures), "clip", "not in the view, because not usable")
        lines += listed(
            _texts(self.kept),
            "clip",
            "not usable now, and still in the view with earlier rows; to drop a clip, delete its "
            "line from the manifest",
        )
        lines += listed(
            _texts(self.unread),
            "source",
            "not readable now; the view keeps the clips, whose rows are in the cache",
        )
        lines += listed(
            [shorten(text) for text in self.truncated_prompts],
            "prompt",
            "of over 512 tokens, cut off at the end",
        )
        lines += listed(
            self.changed_sources,
            "source",
            "changed after the manifest was written; the clips are cut from the changed files. "
            "To cut them again, run wanlora prepare",
        )
        lines += listed(
            self.unused_captions,
            "caption file",
            "edited after prepare read it, and not used; to read the edits: "
            f"{self.captions_command}",
        )
        return lines + ([f"next: {self.next_command}"] if self.next_command else [])


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a plan; of a dry run, the predicted result.

    Attributes:
        clips: Usable clips.
        failures: Clips that cannot be used now, with the reason.
        unchanged: Clips that fail now and stay in the view.
        num_bytes: Bytes added to the store (of a dry run: an estimate).
        view_sha256: Hash of the view; empty if none was written.
        encoded: Result of the workers; None in a dry run.
    """

    clips: Sequence[KeyedClip]
    failures: Sequence[Failure]
    unchanged: Sequence[ViewClip] = ()
    num_bytes: int = 0
    view_sha256: str = ""
    encoded: Encoded | None = None


def summarize(
    plan: Plan,
    outcome: Outcome,
    *,
    cache: Location,
    view: str,
    manifests: Sequence[Path],
    started: float,
    shown: bool,
) -> CacheResult:
    """Count the rows of a run.

    Args:
        plan: Clips and prompts of the manifests.
        outcome: Their result.
        cache: Cache folder or URL.
        view: Name of the view.
        manifests: Paths of the manifests, whose caption files are compared.
        started: Start of the run, by the monotonic clock.
        shown: True if this process prints the result; only then are caption files compared.
    """
    seconds = time.monotonic() - started
    made, dry_run = outcome.encoded or Encoded(), outcome.encoded is None
    keys = {keyed.key for keyed in outcome.clips}
    rows = _rows(plan, made, keys)
    timed = made.clips.values()
    num_timed = max((each.rows for each in timed), default=0)
    seconds_encoding = sum(each.seconds for each in timed)
    waited = sum(each.seconds * each.stall for each in timed)
    unchanged = {clip.clip_id for clip in outcome.unchanged}
    compared, clips = (manifests, plan.clips) if shown else ((), ())
    unused, captions_command = unused_captions(compared, (keyed.clip for keyed in clips))
    captions = {prompt_key(text) for k in plan.clips for text in k.clip.prompts}
    return CacheResult(
        cache=str(cache),
        view=view,
        view_sha256=outcome.view_sha256,
        dry_run=dry_run,
        clips=len(outcome.clips) + len(unchanged),
        clips_encoded=rows["latents"]["encoded"],
        clips_cached=rows["latents"]["cached"],
        duplicate_clips=len(outcome.clips) - len(keys),
        prompts_encoded=rows["text"]["encoded"],
        prompts_cached=rows["text"]["cached"],
        shared_captions=plan.captions - len(captions),
        rows=rows,
        num_bytes=outcome.num_bytes,
        seconds=round(seconds, 3),
        seconds_per_clip=round(seconds_encoding / num_timed, 4) if num_timed else 0.0,
        encoder_stall=round(waited / seconds_encoding, 4) if seconds_encoding else 0.0,
        workers=made.workers,
        clips_encoded_twice=sum(each.twice for each in timed),
        bytes_hashed=plan.num_bytes_hashed,
        failures=[failure for failure in outcome.failures if failure.clip_id not in unchanged],
        kept=[failure for failure in outcome.failures if failure.clip_id in unchanged],
        unread=list(plan.unread),
        truncated_prompts=list(made.prompts.truncated),
        changed_sources=list(plan.changed_sources),
        unused_captions=unused,
        captions_command=captions_command,
        draws=_draws(outcome.clips),
        next_command="" if dry_run else _next_command(cache, view, plan.encoders.variant),
    )


def _rows(plan: Plan, made: Encoded, usable: Collection[str]) -> dict[str, dict[str, int]]:
    """Count rows by kind: encoded by this run (of a dry run: to encode), and there before."""
    num_bytes = plan.bytes_by_kind
    rows = {}
    for kind, missing in plan.missing_keys.items():
        needed = set(plan.prompts) if kind == "text" else set(usable)
        encoded = missing if kind == "text" else missing - made.failures.keys()
        rows[str(kind)] = {
            "encoded": len(encoded), "cached": len(needed - missing), "bytes": num_bytes[kind],
        }  # fmt: skip
    return rows


def _draws(clips: Sequence[KeyedClip]) -> dict[str, float]:
    return shares((k.clip.activity, k.clip.weight) for k in clips if k.clip.split == TRAIN)


def listed(items: Sequence[str], noun: str, what: str) -> list[str]:
    """Format a list: the number of all items, then the first ones."""
    if not items:
        return []
    return [f"{count(len(items), noun)} {what}:", *first(items, JSON)]


def _next_command(cache: Location, view: str, variant: Variant) -> str:
    flags = [] if view == "default" else ["--view", view]
    flags += ["--expert", "high"] if variant.boundary is not None else []
    words = ["wanlora", "train", "--cache", str(cache), *flags]
    return shlex.join([*words, "--output-dir", "outputs/run"])


def _texts(failures: Sequence[Failure]) -> list[str]:
    return [f"[{failure.code}] {failure.clip_id}: {failure.message}" for failure in failures]


def _saved(number: int, noun: str, plural: str = "") -> str:
    return f" ({count(number, noun, plural)} encoded once)" if number else ""
