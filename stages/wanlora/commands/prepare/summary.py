"""Result of stage zero: counts, the plan, notes and the next command.

Owns: `PrepareResult` and its notes. Must not know: settings of the command; counts of clips are
made in `data.survey`.
"""

import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wanlora.commands.prepare.make import ClipRules
from wanlora.core.buckets import DEFAULT_FPS
from wanlora.core.intervals import describe_few_groups, fraction_for
from wanlora.core.units import JSON, duration, first, names, tally
from wanlora.data.captions import Failure, Found
from wanlora.data.clip import TRAIN, VAL, Clip
from wanlora.data.survey import Plan

SHOWN = 8
"""Maximum number of activities named in a note."""


@dataclass(frozen=True)
class Planned:
    """A clip of the plan."""

    clip_id: str
    source: str
    kind: str
    start_s: float
    bucket: str
    activity: str
    split: str
    prompts: tuple[str, ...]
    tokens: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class PrepareResult:
    """Result of stage zero.

    Attributes:
        sources: Source files with a caption or a row, including those that failed.
        val_fraction: Requested share of source groups to hold out.
        train_groups: Source groups to train on.
        val_groups: Source groups held out.
        failed: Sources without a clip, or with a clip that could not be written.
        used: Sources with a clip; at least one.
        errors: Number of failed sources by code.
        dropped: Every failed source.
        warnings: Number of clips by kind of warning.
        video_s: Length of all usable videos at their own speed.
        clips_s: Length of all clips.
        planned: Every clip; only of a dry run, which writes no manifest.
    """

    output: str
    sources: int
    failed: int
    used: int
    clips: int
    train: int
    val: int
    val_fraction: float
    train_groups: int
    val_groups: int
    errors: dict[str, int]
    dropped: tuple[Failure, ...]
    warnings: dict[str, int]
    buckets: dict[str, int]
    activities: dict[str, int]
    video_s: float
    clips_s: float
    plan: Plan
    planned: tuple[Planned, ...]
    notes: tuple[str, ...]
    max_error_rate: float
    dry_run: bool

    @property
    def exit_code(self) -> int:
        """0, or 3 when a larger share of the sources failed than max_error_rate allows."""
        return 3 if self.failed > self.max_error_rate * self.sources else 0

    def lines(self) -> list[str]:
        """Summary table, and the next command."""
        table = [
            ("sources", f"{self.sources:,} found, {self.used:,} used"),
            ("clips", f"{self.clips:,} ({self.clips / self.used:.1f} per source)"),
            ("split", self._split()),
            ("length", f"{duration(self.clips_s)} in clips, of {duration(self.video_s)}"),
            *self.plan.rows(),
            ("not used", self._not_used()),
            *(("", line) for line in self._failures()),
        ]
        table += [("warnings", tally(self.warnings))] if self.warnings else []
        table += [("note", note) for note in self.notes]
        following = (
            "dry run: no manifest was written; the same command without --dry-run checks no "
            "file again"
            if self.dry_run
            else f"next: wanlora verify {shlex.quote(self.output)}"
        )
        return [*(f"{name:<11} {text}" for name, text in table), following]

    def _split(self) -> str:
        share = self.val_groups / (self.train_groups + self.val_groups)
        return (
            f"train {self.train}, val {self.val} clips, of {self.train_groups} and "
            f"{self.val_groups} source groups ({share:.0%} held out, --val-fraction "
            f"{self.val_fraction:g})"
        )

    def _not_used(self) -> str:
        if not self.errors:
            return "none"
        return tally(self.errors)

    def _failures(self) -> list[str]:
        """The first failures; a dry run writes no errors.jsonl."""
        where = JSON if self.dry_run else f"{self.output}/errors.jsonl"
        return first([f"{f.code}: {f.message}" for f in self.dropped], where, indent="")


def summarize(
    found: Found,
    clips: Sequence[Clip],
    failures: Sequence[Failure],
    video_s: float,
    plan: Plan,
    token_counts: Mapping[str, int],
    *,
    output: Path,
    notes: Sequence[str],
    val_fraction: float,
    max_error_rate: float,
    dry_run: bool,
) -> PrepareResult:
    """Count sources, clips and warnings."""
    splits = Counter(clip.split for clip in clips)
    val_groups = {clip.source_group for clip in clips if clip.split == VAL}
    groups = {clip.source_group for clip in clips}
    warnings = Counter(text.split(":")[0] for clip in clips for text in clip.warnings)
    return PrepareResult(
        output=str(output),
        sources=len(found.sources) + len(found.failures),
        failed=len({failure.path for failure in failures}),
        used=len({clip.orig.get("source", clip.source) for clip in clips}),
        clips=len(clips),
        train=splits[TRAIN],
        val=splits[VAL],
        val_fraction=val_fraction,
        train_groups=len(groups - val_groups),
        val_groups=len(val_groups),
        errors=dict(sorted(Counter(failure.code for failure in failures).items())),
        dropped=tuple(failures),
        warnings=dict(sorted(warnings.items())),
        buckets=plan.buckets,
        activities={name: row.clips for name, row in plan.activities.items()},
        video_s=round(video_s, 3),
        clips_s=plan.length_s,
        plan=plan,
        planned=tuple(_planned(clip, token_counts) for clip in clips) if dry_run else (),
        notes=tuple(notes),
        max_error_rate=max_error_rate,
        dry_run=dry_run,
    )


def notes_on(
    found: Found, clips: Sequence[Clip], rules: ClipRules, *, val_fraction: float
) -> list[str]:
    """Notes on sources and clips that the numbers do not show.

    Args:
        found: Sources and their captions.
        clips: Clips of the manifest.
        rules: Rules of the clips.
        val_fraction: Share of source groups to hold out.
    """
    notes = []
    if found.rows_elsewhere:
        notes.append(
            f"{found.rows_elsewhere} caption rows name files outside the given sources; not used"
        )
    if found.images_unused:
        notes.append(
            f"{found.images_unused} images beside videos or without a caption are not used; name "
            "them in a captions table, or put them in a folder of their own"
        )
    cropped = sum(any(text.startswith("cropped:") for text in c.warnings) for c in clips)
    if cropped and not rules.keep_aspect:
        notes.append(
            f"{cropped} clips lose over 30 % of the frame to the crop; --buckets keeps the aspect "
            "of each video"
        )
    if found.ours:
        notes.append(f"{found.ours} files that --materialize wrote are not taken for sources")
    fps = rules.cut.fps
    if fps != DEFAULT_FPS and any(clip.num_frames > 1 for clip in clips):
        notes.append(
            f"Wan 2.1 is a {DEFAULT_FPS:g} fps model, and these clips have {fps:g} fps: "
            f"videos of an adapter trained on them are played at {fps:g} fps"
        )
    return [*notes, *_split_notes(clips, val_fraction)]


def _split_notes(clips: Sequence[Clip], val_fraction: float) -> list[str]:
    """Notes on activities without training or validation clips, and on too few held-out groups."""
    groups = {clip.source_group for clip in clips}
    held = {clip.source_group for clip in clips if clip.split == VAL}
    of_activity: dict[str, set[str]] = defaultdict(set)
    for clip in clips:
        of_activity[clip.activity].add(clip.source_group)
    notes = []
    if untrained := sorted(name for name, own in of_activity.items() if own <= held):
        notes.append(
            f"no training clip of {_names(untrained)}: all of their source groups are held out; "
            "add videos, or name some in a column split=train"
        )
    if val_fraction == 0:
        return notes
    if few := describe_few_groups(len(held), len(groups)):
        notes.append(few)
    unmeasured = sorted(name for name, own in of_activity.items() if held and not own & held)
    single = [name for name in unmeasured if len(of_activity[name]) == 1]
    if several := [name for name in unmeasured if name not in single]:
        of_two = sum(len(own) > 1 for own in of_activity.values())
        share = fraction_for(of_two, len(groups)) or 0.5
        notes.append(
            f"no validation clip of {_names(several)}: --val-fraction {share:g} holds out one "
            f"source group or more of each of the {of_two} activities that have two"
        )
    if single:
        notes.append(
            f"no validation clip of {_names(single)}: with one source group each, they are only "
            "trained; add a video of each"
        )
    no_group = sum(any(w.startswith("no_group") for w in clip.warnings) for clip in clips)
    if no_group:
        notes.append(
            f"{no_group} .npz clips have no source group: two clips of one video may be on both "
            "sides of the split; name it in a column source_group or with --set group_pattern=REGEX"
        )
    return notes


def _names(activities: Sequence[str]) -> str:
    return names((name or "no activity" for name in activities), most=SHOWN)


def _planned(clip: Clip, token_counts: Mapping[str, int]) -> Planned:
    return Planned(
        clip_id=clip.clip_id,
        source=clip.source,
        kind=clip.kind,
        start_s=clip.start_s,
        bucket=str(clip.bucket),
        activity=clip.activity,
        split=clip.split,
        prompts=clip.prompts,
        tokens=max(token_counts[text] for text in clip.prompts),
        warnings=clip.warnings,
    )
