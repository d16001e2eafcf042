"""Load clips exactly as stage one will, and list what could not be used and why.

Owns: the check between preparing and encoding. Loads through `clip_frames.load_unchanged` and
changes nothing.
"""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wanlora.config import VerifyConfig
from wanlora.core.text import shorten
from wanlora.core.units import JSON, count, first, tally
from wanlora.data import manifest
from wanlora.data.clip import Clip
from wanlora.data.edits import unused_captions
from wanlora.data.source_root import advice, find_sources
from wanlora.data.survey import Plan, survey
from wanlora.errors import MediaError
from wanlora.progress import bar, show_figures
from wanlora.report.generated import require_own_page
from wanlora.wan.tokens import TokenCounts, count_tokens

SHOWN = 10
"""Maximum number of clips shown line by line; --json has them all."""


@dataclass(frozen=True)
class LoadedClip:
    """A clip that can be encoded: shape `[1, T, C, H, W]`, smallest and largest value."""

    clip_id: str
    shape: tuple[int, ...]
    low: float
    high: float
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class FailedClip:
    """A clip that stage one would leave out."""

    clip_id: str
    source: str
    code: str
    message: str


@dataclass(frozen=True)
class VerifyResult:
    """Outcome of loading clips.

    Attributes:
        total: Clips in the manifests; more than were loaded when there is a limit.
        plan: Contents of the clips that could be loaded, and the cost of encoding them.
        unused_captions: Caption files that were edited after `prepare` read them.
        captions_command: Command that reads them.
        missing_sources: Advice about sources that are not at their paths; empty if there are none.
        source_root: Folders that were searched for sources too.
    """

    total: int
    loaded: tuple[LoadedClip, ...]
    failed: tuple[FailedClip, ...]
    buckets: dict[str, int]
    plan: Plan
    manifests: tuple[str, ...]
    unused_captions: tuple[str, ...] = ()
    captions_command: str = ""
    missing_sources: str = ""
    source_root: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0, or 3 when a clip failed."""
        return 3 if self.failed else 0

    def lines(self) -> list[str]:
        """The first clips, every failure, the plan of the clips that load, the next command."""
        failed = [f"FAILED {clip.code}: {clip.clip_id}: {clip.message}" for clip in self.failed]
        tried = len(self.loaded) + len(self.failed)
        lines = [
            *first([_line_of(clip) for clip in self.loaded], JSON, most=SHOWN, indent=""),
            *first(failed, JSON, indent=""),
            *(f"{name:<11} {text}" for name, text in (self.plan.rows() if self.loaded else [])),
            f"{len(self.loaded):,} of {count(tried, 'clip')} can be loaded "
            f"({tally(self.buckets) or 'none'})",
        ]
        if tried < self.total:
            lines.append(f"not tried: {count(self.total - tried, 'clip')} (--limit)")
        if self.unused_captions:
            lines.append(
                f"{len(self.unused_captions):,} caption files were edited after prepare read "
                f"them, and their text is not used; read them with: {self.captions_command}"
            )
            lines += first(self.unused_captions, JSON)
        return lines + self._following()

    def _following(self) -> list[str]:
        """Reasons of the clips left out, or the next command."""
        if self.failed:
            codes = sorted(Counter(clip.code for clip in self.failed).items())
            left_out = f"left out: {count(len(self.failed), 'clip')}: {tally(dict(codes))}"
            return [left_out, *([self.missing_sources] if self.missing_sources else [])]
        if not self.loaded:
            return []
        names = [word for path in self.manifests for word in ("--manifest", path)]
        names += [word for path in self.source_root for word in ("--source-root", path)]
        return [f"next: {shlex.join(['wanlora', 'cache-latents', *names])}"]


def run(config: VerifyConfig) -> VerifyResult:
    """Load the clips of manifests.

    Raises:
        ManifestError: A manifest cannot be read.
        OutputError: The folder of the page may not be written.
    """
    require_own_page(config.html, "verify", flag="--html")
    bad: list[manifest.BadLine] = []
    everything = manifest.read_all(config.manifests, on_bad=bad.append)
    everything = find_sources(everything, config.source_root).clips
    manifest.warn_of_old_colours(everything)
    chosen = everything
    if config.limit:
        chosen = _first_of_each(config.manifests, config.limit, everything)
    loaded, failures = _load_all(chosen)
    failed = [*(FailedClip(line.where, "", "bad_line", line.reason) for line in bad), *failures]
    names = {clip.clip_id for clip in loaded}
    usable = [clip for clip in chosen if clip.clip_id in names]
    tokens = count_tokens(config.model, (text for clip in usable for text in clip.prompts))
    plan = survey(usable, tokens.counts, tokenizer=tokens.tokenizer)
    if config.html is not None:
        _write_sheet(config.html, usable, failed, plan, tokens, config.html_clips)
    lost = [clip.source for clip in failed if clip.code == "missing"]
    unused, captions_command = unused_captions(config.manifests, everything)
    return VerifyResult(
        total=len(everything) + len(bad),
        loaded=tuple(loaded),
        failed=tuple(failed),
        buckets=dict(Counter("x".join(_size(clip.shape)) for clip in loaded).most_common()),
        plan=plan,
        manifests=tuple(map(str, config.manifests)),
        unused_captions=tuple(unused),
        captions_command=captions_command,
        missing_sources=advice(lost, len({clip.path for clip in chosen}), config.source_root),
        source_root=tuple(map(str, config.source_root)),
    )


def _first_of_each(
    manifests: Sequence[Path], number: int, everything: Sequence[Clip]
) -> list[Clip]:
    clips = {clip.clip_id: clip for clip in everything}
    return [
        clips[clip.clip_id]
        for path in manifests
        for clip in manifest.read_all([path], on_bad=_listed_already)[:number]
    ]


def _listed_already(line: manifest.BadLine) -> None:
    pass


def _load_all(clips: Sequence[Clip]) -> tuple[list[LoadedClip], list[FailedClip]]:
    loaded: list[LoadedClip] = []
    failed: list[FailedClip] = []
    with bar(total=len(clips), description="loading", unit="clip") as progress:
        for clip in clips:
            try:
                loaded.append(_load(clip))
            except MediaError as error:
                failed.append(FailedClip(clip.clip_id, clip.source, error.code, str(error)))
                show_figures(progress, f"{len(failed)} errors")
            progress.update(1)
    return loaded, failed


def _load(clip: Clip) -> LoadedClip:
    from wanlora.data.clip_frames import load_unchanged, to_signed  # noqa: PLC0415  (imports torch)

    frames = load_unchanged(replace(clip, source_sha256=None), {})
    low, high = to_signed(frames.aminmax().min[None]), to_signed(frames.aminmax().max[None])
    return LoadedClip(clip.clip_id, (1, *frames.shape), low.item(), high.item(), clip.prompts)


def _size(shape: tuple[int, ...]) -> tuple[str, str, str]:
    _, frames, _, height, width = shape
    return str(frames), str(height), str(width)


def _line_of(clip: LoadedClip) -> str:
    others = f" (+{len(clip.prompts) - 1} captions)" if len(clip.prompts) > 1 else ""
    values = f"[{clip.low:.2f}, {clip.high:.2f}]"
    return f"{clip.clip_id}  {list(clip.shape)}  {values}  {shorten(clip.prompts[0])}{others}"


def _write_sheet(
    path: Path,
    clips: list[Clip],
    failed: list[FailedClip],
    plan: Plan,
    tokens: TokenCounts,
    most: int,
) -> None:
    from wanlora.data import contact_sheet  # noqa: PLC0415  (imports torch)

    left = [(clip.source, clip.code, clip.message) for clip in failed]
    contact_sheet.write(path, clips, left, plan, tokens.counts, command="verify", most=most)
