"""Sources of clips: find them, check each file once, and cut them.

Owns: the progress over files, the files that are checked again after a kill, and the clips of files
with the same bytes. Must not know: the split, files of the output folder except the journal.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from wanlora.commands.prepare.check import Checked, check_all
from wanlora.commands.prepare.clip_files import is_clip_file
from wanlora.commands.prepare.cuts import unique_ids
from wanlora.commands.prepare.journal import Journal
from wanlora.commands.prepare.make import ClipRules, clips_of
from wanlora.core import units
from wanlora.data.captions import Failure, Found, Source, find
from wanlora.data.clip import Clip
from wanlora.errors import MediaError, NoCaptionError
from wanlora.media import scenes
from wanlora.media.probe import Scan
from wanlora.media.source import SourceHashes, reading
from wanlora.progress import bar, show_figures

Outcomes = Mapping[Path, Checked | MediaError]

log = logging.getLogger(__name__)


class ClipsOfSources(NamedTuple):
    """Clips of all sources.

    Attributes:
        clips: Clips, with unique ids.
        failures: Sources and rows that gave no clip, by path.
        video_s: Length of all sources that gave clips.
    """

    clips: list[Clip]
    failures: list[Failure]
    video_s: float


def find_sources(given: Sequence[Path], captions: Path | None, *, caption_prefix: str) -> Found:
    """Find sources and their captions; raises the errors of `captions.find`."""
    try:
        return find(given, captions, ours=is_clip_file)
    except NoCaptionError as error:
        if not caption_prefix:
            raise
        raise NoCaptionError(
            f"{error}\n--caption-prefix is put before captions and is not a caption; to train on "
            "it alone, write it into a .txt beside each video or a row of a table"
        ) from None


def check_sources(
    sources: Sequence[Source], folder: Path, rules: ClipRules, *, workers: int, stall_s: float
) -> tuple[Outcomes, SourceHashes]:
    """Check each file, except those that an earlier run checked and that have not changed.

    Args:
        sources: Sources and their captions.
        folder: Folder of the journal.
        rules: Detector of scene cuts; the other rules are logged.
        workers: Number of processes; see `map_in_processes`.
        stall_s: Time without progress after which a file fails.

    Returns:
        The outcome for each file, and the hashes of those that can be used.

    Raises:
        ConfigError: The detector cannot be used.
        OutputError: The journal cannot be written.
    """
    scenes.finder(rules.detector)  # refuses here what would fail for every file
    paths = [source.path for source in sources]
    with Journal(folder, rules.detector) as journal:
        outcomes = journal.recall(paths)
        todo = [path for path in paths if path not in outcomes]
        log.info(
            "to check: %s, for clips of %s; checked before: %s",
            units.count(len(todo), "source"), rules, units.count(len(outcomes), "source"),
        )  # fmt: skip
        failed = sum(isinstance(outcome, MediaError) for outcome in outcomes.values())
        checking = check_all(todo, workers=workers, detector=rules.detector, stall_s=stall_s)
        with bar(
            total=len(paths), done=len(outcomes), description="checking", unit="video"
        ) as progress:
            for path, outcome in checking:
                journal.note(path, outcome)
                outcomes[path] = outcome
                failed += isinstance(outcome, MediaError)
                show_figures(progress, f"{failed} errors")
                progress.update(1)
        return outcomes, journal.hashes(outcomes)


def cut_sources(found: Found, outcomes: Outcomes, rules: ClipRules) -> ClipsOfSources:
    """Cut every source into clips; the result does not depend on the order of the checks."""
    clips: list[Clip] = []
    failures = list(found.failures)
    video_s = 0.0
    first_with: dict[str, Path] = {}
    for source in found.sources:
        try:
            checked = outcomes[source.path]
            if isinstance(checked, MediaError):
                raise checked
            with reading(source.path):
                own = clips_of(source, checked, rules)
        except MediaError as error:
            failures.append(Failure(error.code, str(error), str(source.path)))
            continue
        twin = first_with.setdefault(checked.sha256, source.path)
        if twin != source.path:
            warning = f"duplicate: same bytes as {twin}"
            own = [replace(clip, warnings=(*clip.warnings, warning)) for clip in own]
        clips += own
        video_s += _length_s(checked, own)
    ids = unique_ids([clip.clip_id for clip in clips])
    named = [replace(clip, clip_id=name) for clip, name in zip(clips, ids, strict=True)]
    failures.sort(key=lambda failure: (failure.path, failure.code))
    return ClipsOfSources(named, failures, video_s)


def _length_s(checked: Checked, clips: Sequence[Clip]) -> float:
    if isinstance(checked.content, Scan):
        return checked.content.span_s
    return sum(clip.num_frames / clip.fps for clip in clips)
