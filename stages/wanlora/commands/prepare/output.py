"""Files of the output folder, except the journal.

Owns: train.jsonl and val.jsonl as one, errors.jsonl, sources.json, the clips of `--materialize`,
the plan and its contact sheet. Must not know: how clips are made.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from wanlora.commands.prepare.journal import require_own_files
from wanlora.core import units
from wanlora.core.buckets import MAX_TOKENS
from wanlora.data import manifest
from wanlora.data.captions import Failure, Found
from wanlora.data.clip import VAL, Clip
from wanlora.data.edits import MANIFESTS, Reading, announce, write_record
from wanlora.data.source_paths import written_path
from wanlora.data.survey import Plan, survey
from wanlora.errors import ManifestError
from wanlora.files import fsync_dir, require_folder, write_atomic, write_text
from wanlora.media.source import SOURCES, SourceHashes, hashes_document
from wanlora.progress import bar
from wanlora.report.generated import require_own_page
from wanlora.wan.tokens import TokenCounts, count_tokens

ERRORS = "errors.jsonl"


def require_outputs(folder: Path, page: Path | None) -> None:
    """Check that the outputs may be written.

    Raises:
        OutputError: An output may not be written, or is a file of another program.
    """
    require_folder(folder, flag="--output")
    require_own_page(page, "prepare", flag="--html")
    require_own_files(folder)


def nothing_left(found: Found, failures: Sequence[Failure], folder: Path) -> ManifestError:
    """Build the error for sources without a single clip."""
    return ManifestError(
        f"not one clip from {units.count(len(found.sources), 'source')}: "
        f"{units.tally(Counter(failure.code for failure in failures))}\n"
        + "\n".join(units.first([f"[{f.code}] {f.message}" for f in failures], ERRORS))
        + f"\nreasons are in {folder / ERRORS}"
    )


def write_errors(folder: Path, failures: Sequence[Failure]) -> None:
    """Write errors.jsonl: one line per source or row that cannot be used."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        {"code": failure.code, "stage": "prepare", "message": failure.message, "path": failure.path}
        for failure in failures
    ]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_text(folder / ERRORS, text)


def write_manifests(
    folder: Path,
    clips: Sequence[Clip],
    unedited: Sequence[Clip],
    how_read: Reading,
    hashes: SourceHashes,
) -> None:
    """Write the manifests that have clips, their record, and the hashes of their sources.

    A kill in between leaves a usable train.jsonl.

    Args:
        folder: Folder of the manifests.
        clips: Clips with the edits that were kept.
        unedited: Clips without edits, for the record.
        how_read: Record of the captions that were read.
        hashes: Hashes of files, by path.
    """
    train, val = MANIFESTS
    held = [clip for clip in clips if clip.split == VAL]
    parts = {train: [clip for clip in clips if clip.split != VAL], val: held}
    files = {name: manifest.document(own) for name, own in parts.items() if own}
    as_made = files if unedited == clips else {}
    announce(folder, as_made)
    (folder / val).unlink(missing_ok=True)
    fsync_dir(folder)
    for name in MANIFESTS:
        if name in files:
            write_atomic(folder / name, files[name])
        else:
            (folder / name).unlink(missing_ok=True)
    write_record(folder, as_made, unedited, how_read)
    fsync_dir(folder)
    _write_hashes(folder, clips, hashes)


def _write_hashes(folder: Path, clips: Sequence[Clip], hashes: SourceHashes) -> None:
    """Write the hashes of the manifests' sources, so that stage one need not read the files."""
    known = {
        written_path(path, folder): hashes[str(path)]
        for path in dict.fromkeys(clip.path for clip in clips)
        if str(path) in hashes
    }
    write_atomic(folder / SOURCES, hashes_document(known))


def plan_clips(clips: Sequence[Clip], model: str) -> tuple[list[Clip], TokenCounts, Plan]:
    """Count tokens with a model's tokenizer, warn of long captions, and survey the clips."""
    tokens = count_tokens(model, (text for clip in clips for text in clip.prompts))
    warned = [_warn_of_length(clip, tokens) for clip in clips]
    return warned, tokens, survey(warned, tokens.counts, tokenizer=tokens.tokenizer)


def _warn_of_length(clip: Clip, tokens: TokenCounts) -> Clip:
    most = max(tokens.counts[text] for text in clip.prompts)
    if most <= MAX_TOKENS:
        return clip
    about = "" if tokens.tokenizer else "about "
    warning = f"caption_truncated: {about}{most} tokens, cut at {MAX_TOKENS}"
    return replace(clip, warnings=(*clip.warnings, warning))


def materialize_clips(
    clips: Sequence[Clip], failures: Sequence[Failure], folder: Path, hashes: SourceHashes
) -> tuple[list[Clip], list[Failure]]:
    """Write the frames of every clip; return the clips of these files, and all failures."""
    from wanlora.commands.prepare.materialize import materialize  # noqa: PLC0415  it imports torch

    with bar(total=len(clips), description="writing clips", unit="clip") as progress:
        made, failed = materialize(clips, folder, hashes, step=lambda: progress.update(1))
    failures = [
        *failures,
        *(Failure(error.code, str(error), str(clip.path)) for clip, error in failed),
    ]
    write_errors(folder, failures)
    return made, failures


def write_sheet(
    path: Path,
    clips: Sequence[Clip],
    failures: Sequence[Failure],
    plan: Plan,
    tokens: TokenCounts,
    *,
    most: int,
) -> None:
    """Write the contact sheet of the clips."""
    from wanlora.data import contact_sheet  # noqa: PLC0415  it imports torch

    left = [(failure.path, failure.code, failure.message) for failure in failures]
    contact_sheet.write(path, clips, left, plan, tokens.counts, command="prepare", most=most)
