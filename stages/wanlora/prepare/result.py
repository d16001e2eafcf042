"""What stage zero says when it is done: counts, notes and the next command.

Owns: `PrepareResult`. Every number is counted, nothing is estimated.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wanlora import manifest
from wanlora.captions import Failure, Found
from wanlora.config import PrepareConfig
from wanlora.manifest import Clip


@dataclass(frozen=True)
class PrepareResult:
    """What stage zero made; every number is counted, nothing is estimated.

    Attributes:
        sources: Source files with a caption or a row; those that failed are among them.
        errors: Number of failed sources by code.
        warnings: Number of clips by kind of warning.
        video_s: Length of all usable videos at their own speed.
        clips_s: Length of all clips.
    """

    output: str
    sources: int
    failed: int
    clips: int
    train: int
    val: int
    errors: dict[str, int]
    warnings: dict[str, int]
    buckets: dict[str, int]
    activities: dict[str, int]
    video_s: float
    clips_s: float
    notes: tuple[str, ...]
    max_error_rate: float

    @property
    def exit_code(self) -> int:
        """0, or 3 when a larger share of the sources failed than max_error_rate allows."""
        return 3 if self.failed > self.max_error_rate * self.sources else 0

    def lines(self) -> list[str]:
        """Summary table, and the next command."""
        used = self.sources - self.failed
        errors = (
            f"{counts(self.errors)}  (see {self.output}/errors.jsonl)" if self.errors else "none"
        )
        table = [
            ("sources", f"{self.sources} found, {used} used"),
            ("clips", f"{self.clips} ({self.clips / used:.1f} a source)"),
            ("split", f"train {self.train}, val {self.val}"),
            ("length", f"{self.clips_s:.1f} s in clips, of {self.video_s:.1f} s"),
            ("buckets", counts(self.buckets)),
            ("activities", counts(self.activities)),
            ("not used", errors),
        ]
        table += [("warnings", counts(self.warnings))] if self.warnings else []
        table += [("note", note) for note in self.notes]
        return [
            *(f"{name:<11}{text}" for name, text in table),
            f"next: wanlora verify {self.output}",
        ]


def summarize(
    config: PrepareConfig,
    found: Found,
    clips: list[Clip],
    failures: Sequence[Failure],
    video_s: float,
) -> PrepareResult:
    """Count what was made."""
    splits = Counter(clip.split for clip in clips)
    warnings = Counter(text.split(":")[0] for clip in clips for text in clip.warnings)
    return PrepareResult(
        output=str(config.output),
        sources=len(found.sources) + len(found.failures),
        failed=len(failures),
        clips=len(clips),
        train=splits[manifest.TRAIN],
        val=splits[manifest.VAL],
        errors=dict(sorted(Counter(failure.code for failure in failures).items())),
        warnings=dict(sorted(warnings.items())),
        buckets=dict(Counter(str(clip.bucket) for clip in clips).most_common()),
        activities=dict(sorted(Counter(clip.activity for clip in clips).items())),
        video_s=round(video_s, 3),
        clips_s=round(sum(clip.num_frames / clip.fps for clip in clips), 3),
        notes=tuple(_notes(config, found, clips)),
        max_error_rate=config.max_error_rate,
    )


def _notes(config: PrepareConfig, found: Found, clips: list[Clip]) -> list[str]:
    notes = []
    if found.rows_elsewhere:
        notes.append(
            f"{found.rows_elsewhere} caption rows name files outside the given sources; not used"
        )
    if config.val_fraction > 0 and all(clip.split == manifest.TRAIN for clip in clips):
        notes.append("no validation split: all clips come from one source group")
    no_group = sum(any(w.startswith("no_group") for w in clip.warnings) for clip in clips)
    if no_group and config.val_fraction > 0:
        notes.append(
            f"{no_group} .npz clips have no source group: two clips of one video may stand on both "
            "sides of the split; name it in a column source_group or with --set group_pattern=REGEX"
        )
    return notes


def counts(numbers: Mapping[str, int]) -> str:
    """`a 1, b 2` for people."""
    return ", ".join(f"{name} {count}" for name, count in numbers.items())
