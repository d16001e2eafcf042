"""The stage: find, check, cut, split, plan, write.

Owns: the order of the steps and the files of the output folder. Decoding is media's, captions are
captions', cutting is cuts', what a clip says is make's.
"""

import json
import logging
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from wanlora.commands.prepare.check import Checked, check_all
from wanlora.commands.prepare.clip_files import is_clip_file
from wanlora.commands.prepare.cuts import unique_ids
from wanlora.commands.prepare.journal import Journal, require_own_files
from wanlora.commands.prepare.make import clips_of
from wanlora.commands.prepare.split import group_activities, held_out, held_out_by_0_1_0
from wanlora.commands.prepare.summary import PrepareResult, counts, summarize
from wanlora.config import PrepareConfig, command_line
from wanlora.core import units
from wanlora.core.buckets import MAX_TOKENS
from wanlora.data import manifest
from wanlora.data.captions import Failure, Found, find
from wanlora.data.clip import TRAIN, VAL, Clip
from wanlora.data.edits import (
    MANIFESTS,
    Edits,
    Reading,
    announce,
    back_up,
    compare_without_record,
    find_edits,
    keep,
    reading_of,
    without_edits,
    write_record,
)
from wanlora.data.source_paths import written_path
from wanlora.data.survey import Plan, survey
from wanlora.errors import ConfigError, ManifestError, MediaError, NoCaptionError
from wanlora.files import fsync_dir, require_folder, write_atomic, write_text
from wanlora.media import scenes
from wanlora.media.probe import Scan
from wanlora.media.source import SOURCES, SourceHashes, hashes_document, reading
from wanlora.progress import bar, show_figures
from wanlora.report.contact_sheet_page import Left
from wanlora.report.generated import require_own_page
from wanlora.wan.tokens import TokenCounts, count_tokens

Outcomes = Mapping[Path, Checked | MediaError]


logger = logging.getLogger(__name__)


def run(config: PrepareConfig) -> PrepareResult:
    """Make a manifest, or with `dry_run` only the plan of one.

    Raises:
        ManifestError: No video, no caption, or not a single clip; errors.jsonl then says why.
        ConfigError: group_pattern is no regular expression with a group, or PySceneDetect is asked
            for and cannot be used.
        OutputError: An output may not be written, or is a file of something else.
    """
    pattern = _compile(config.group_pattern)
    require_folder(config.output, flag="--output")
    require_own_page(config.html, "prepare", flag="--html")
    require_own_files(config.output)
    by_hand = find_edits(config.output)
    if by_hand.recorded or by_hand.bad:
        _require_decision(by_hand, config)
    since_ns = time.time_ns()
    found = _found(config)
    how_read = reading_of(
        found.tables,
        command=command_line("prepare", config, without=("dry_run", "html", "edits")),
        since_ns=since_ns,
        sidecars=config.captions is None,
        prefix=config.caption_prefix.strip(),
    )
    outcomes, hashes = _check_sources(found, config)
    clips, failures, video_s = _clips_of_all(found, outcomes, config, pattern)
    failures = sorted(
        [*found.failures, *failures], key=lambda failure: (failure.path, failure.code)
    )
    made = _split(clips, found, config) if clips else []
    if made:
        by_hand = compare_without_record(by_hand, made, _split(clips, found, config, old=True))
        _require_decision(by_hand, config)
    if not (config.dry_run and clips):  # a dry run leaves what belongs to the manifest alone
        _write_errors(config.output / "errors.jsonl", failures)
    if not clips:
        raise ManifestError(_nothing_left(found, failures, config))
    clips, notes = _with_edits(made, by_hand, config)
    notes += _moved(config.output, clips)
    tokens = count_tokens(config.model, (text for clip in clips for text in clip.prompts))
    clips = [_warn_of_length(clip, tokens) for clip in clips]
    plan = survey(clips, tokens.counts, tokenizer=tokens.tokenizer)
    if config.html is not None:
        _write_sheet(config.html, clips, failures, plan, tokens, config.html_clips)
    if not config.dry_run:
        if config.materialize is not None:
            clips, failures = _materialized(clips, failures, hashes, config)
            if not clips:
                raise ManifestError(_nothing_left(found, failures, config))
        if by_hand:
            copies = ", ".join(path.name for path in back_up(config.output))
            notes.append(f"the edited manifest was copied to {copies}")
        removed = by_hand.removed if config.edits == "keep" else frozenset[str]()
        unedited = without_edits(clips, made, removed)
        _write_manifests(config.output, clips, unedited, how_read)
        _write_hashes(config.output, clips, hashes)
    return summarize(config, found, clips, failures, video_s, plan, tokens.counts, notes)


def _require_decision(edits: Edits, config: PrepareConfig) -> None:
    """Refuse to replace edited manifests unasked.

    Raises:
        ManifestError: There are edits, and `config.edits` does not decide what happens to them.
    """
    if not edits or config.dry_run or config.edits == "drop":
        return
    where = ", ".join(str(config.output / name) for name in MANIFESTS)
    if config.edits is None:
        raise ManifestError(
            f"the manifest was edited since prepare wrote it ({where}: {edits}). Keep the edits "
            "with --edits keep, discard them with --edits drop (a copy of the edited file is kept "
            "in both cases), or choose another --output"
        )
    if edits.bad:
        raise ManifestError(
            "edits cannot be kept while lines cannot be read; correct them first:\n"
            + "\n".join(units.first([line.message for line in edits.bad], str(config.output)))
        )


def _found(config: PrepareConfig) -> Found:
    try:
        return find(config.sources, config.captions, ours=is_clip_file)
    except NoCaptionError as error:
        if not config.caption_prefix.strip():
            raise
        raise NoCaptionError(
            f"{error}\n--caption-prefix is put before captions and is not a caption; to train on "
            "it alone, write it into a .txt beside each video or a row of a table"
        ) from None


def _nothing_left(found: Found, failures: Sequence[Failure], config: PrepareConfig) -> str:
    return (
        f"not one clip from {units.count(len(found.sources), 'source')}: "
        f"{counts(Counter(failure.code for failure in failures))}\n"
        + "\n".join(units.first([f"[{f.code}] {f.message}" for f in failures], "errors.jsonl"))
        + f"\nreasons are in {config.output / 'errors.jsonl'}"
    )


def _check_sources(found: Found, config: PrepareConfig) -> tuple[Outcomes, SourceHashes]:
    """Check every source, but not again what an earlier run found in a file that is the same."""
    detector = _detector(config)
    scenes.finder(detector)  # refuses here what would fail for every file
    paths = [source.path for source in found.sources]
    with Journal(config.output, detector) as journal:
        outcomes = journal.recall(paths)
        todo = [path for path in paths if path not in outcomes]
        logger.info(
            "to check: %s, for clips of %d frames, %dx%d px, at %g fps; checked before: %s",
            units.count(len(todo), "source"), config.num_frames, config.height, config.width,
            config.fps, units.count(len(outcomes), "source"),
        )  # fmt: skip
        failed = sum(isinstance(outcome, MediaError) for outcome in outcomes.values())
        checking = check_all(
            todo, workers=config.workers, detector=detector, stall_s=config.stall_s
        )
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


def _detector(config: PrepareConfig) -> scenes.Detector:
    """Cuts are looked for even where clips may cross them: then a warning says so."""
    return "builtin" if config.scenes == "allow" else config.scenes


def _clips_of_all(
    found: Found, outcomes: Outcomes, config: PrepareConfig, pattern: re.Pattern[str] | None
) -> tuple[list[Clip], list[Failure], float]:
    """Cut every source; the outcome does not depend on which was ready first."""
    clips: list[Clip] = []
    failures: list[Failure] = []
    video_s = 0.0
    first_with: dict[str, Path] = {}
    for source in found.sources:
        try:
            checked = outcomes[source.path]
            if isinstance(checked, MediaError):
                raise checked
            with reading(source.path):
                own = clips_of(source, checked, config, pattern)
        except MediaError as error:
            failures.append(Failure(error.code, str(error), str(source.path)))
            continue
        twin = first_with.setdefault(checked.sha256, source.path)
        if twin != source.path:
            own = [_warn(clip, f"duplicate: same bytes as {twin}") for clip in own]
        clips += own
        video_s += _length_s(checked, own)
    ids = unique_ids([clip.clip_id for clip in clips])
    return [replace(c, clip_id=i) for c, i in zip(clips, ids, strict=True)], failures, video_s


def _length_s(checked: Checked, clips: list[Clip]) -> float:
    if isinstance(checked.content, Scan):
        return checked.content.span_s
    return sum(clip.num_frames / clip.fps for clip in clips)


def _warn(clip: Clip, warning: str) -> Clip:
    return replace(clip, warnings=(*clip.warnings, warning))


def _warn_of_length(clip: Clip, tokens: TokenCounts) -> Clip:
    most = max(tokens.counts[text] for text in clip.prompts)
    if most <= MAX_TOKENS:
        return clip
    about = "" if tokens.tokenizer else "about "
    return _warn(clip, f"caption_truncated: {about}{most} tokens, cut at {MAX_TOKENS}")


def _moved(output: Path, clips: Sequence[Clip]) -> list[str]:
    """Note on clips that the manifest so far holds out and the new one trains on."""
    path = output / MANIFESTS[1]
    before = set()
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):  # a damaged line was refused, or is discarded on request
            before.add(dict(json.loads(line)).get("clip_id"))
    moved = sum(clip.split == TRAIN and clip.clip_id in before for clip in clips)
    if not moved:
        return []
    return [
        f"{moved} clips that were held out until now are trained on: compare no held-out loss of "
        "an earlier run with one of a later run"
    ]


def _split(
    clips: list[Clip], found: Found, config: PrepareConfig, *, old: bool = False
) -> list[Clip]:
    """Give each clip its side, or with `old` the one that release 0.1.0 gave it."""
    chosen_for = {source.path: source.split for source in found.sources if source.split}
    chosen: dict[str, str] = {}
    for clip in clips:
        side = chosen_for.get(clip.path)
        if side and chosen.setdefault(clip.source_group, side) != side:
            raise ManifestError(
                f"source group {clip.source_group} ({clip.source}) is named both train and val; "
                "clips of one group must stand on one side, or validation would see training videos"
            )
    val = (held_out_by_0_1_0 if old else held_out)(
        group_activities(clips),
        val_fraction=config.val_fraction,
        seed=config.seed,
        chosen=chosen,
    )
    return [replace(clip, split=VAL if clip.source_group in val else TRAIN) for clip in clips]


def _write_sheet(
    path: Path,
    clips: list[Clip],
    failures: list[Failure],
    plan: Plan,
    tokens: TokenCounts,
    most: int,
) -> None:
    from wanlora.data import contact_sheet  # noqa: PLC0415  it imports torch, which checking does not need

    left = [Left(failure.path, failure.code, failure.message) for failure in failures]
    with bar(total=min(most, len(clips)), description="contact sheet", unit="clip") as progress:
        contact_sheet.write(
            path, clips, left, plan, tokens.counts, command="prepare", most=most,
            step=lambda: progress.update(1),
        )  # fmt: skip


def _materialized(
    clips: list[Clip], failures: list[Failure], hashes: SourceHashes, config: PrepareConfig
) -> tuple[list[Clip], list[Failure]]:
    from wanlora.commands.prepare.materialize import materialize  # noqa: PLC0415  it imports torch

    with bar(total=len(clips), description="writing clips", unit="clip") as progress:
        made, failed = materialize(clips, config.output, hashes, step=lambda: progress.update(1))
    failures = [
        *failures,
        *(Failure(error.code, str(error), str(clip.path)) for clip, error in failed),
    ]
    _write_errors(config.output / "errors.jsonl", failures)
    return made, failures


def _with_edits(
    made: list[Clip], by_hand: Edits, config: PrepareConfig
) -> tuple[list[Clip], list[str]]:
    """Return the clips of the manifest, and notes on edits."""
    if not by_hand or config.edits == "drop":
        return made, []
    if config.edits is None:
        return made, [f"the manifest was edited ({by_hand}): add --edits keep or --edits drop"]
    clips, notes = keep(made, by_hand)
    if not clips:
        raise ManifestError("every clip was removed by hand; write them again with --edits drop")
    return clips, notes


def _write_manifests(
    output: Path, clips: Sequence[Clip], unedited: Sequence[Clip], how_read: Reading
) -> None:
    """Write those that have clips; a kill in between leaves a train.jsonl that can stand alone."""
    train, val = MANIFESTS
    held = [clip for clip in clips if clip.split == VAL]
    parts = {train: [clip for clip in clips if clip.split != VAL], val: held}
    files = {name: manifest.document(own) for name, own in parts.items() if own}
    as_made = files if unedited == clips else {}
    announce(output, as_made)
    (output / val).unlink(missing_ok=True)
    fsync_dir(output)
    for name in MANIFESTS:
        if name in files:
            write_atomic(output / name, files[name])
        else:
            (output / name).unlink(missing_ok=True)
    write_record(output, as_made, unedited, how_read)
    fsync_dir(output)


def _write_hashes(output: Path, clips: list[Clip], hashes: SourceHashes) -> None:
    """Leave the hashes of the manifests' sources to stage one, which reads them otherwise."""
    known = {
        written_path(path, output): hashes[str(path)]
        for path in dict.fromkeys(clip.path for clip in clips)
        if str(path) in hashes
    }
    write_atomic(output / SOURCES, hashes_document(known))


def _write_errors(path: Path, failures: list[Failure]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [
        {"code": failure.code, "stage": "prepare", "message": failure.message, "path": failure.path}
        for failure in failures
    ]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_text(path, text)


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"group_pattern {pattern!r} is no regular expression: {error}") from None
    if compiled.groups < 1:
        raise ConfigError(
            f"group_pattern {pattern!r} has no group; put ( ) around the video's name"
        )
    return compiled
