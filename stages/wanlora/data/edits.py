"""Edits since `prepare` wrote a manifest: manual edits of its lines, and edits of its captions.

Owns: OUTPUT/.prepare-written.json. An edited manifest is only replaced on request, and a
caption file that was edited later is reported, because only `prepare` reads it.
"""

import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wanlora.core.text import shorten
from wanlora.core.units import count
from wanlora.data import manifest
from wanlora.data.captions.folders import absolute
from wanlora.data.captions.notes import sidecar_text
from wanlora.data.clip import TRAIN, VAL, Clip
from wanlora.data.manifest import BadLine
from wanlora.data.manifest_lines import line_of, parse_line
from wanlora.errors import ManifestError
from wanlora.files import encode_text, existing_spelling, write_json

NAME = ".prepare-written.json"
VERSION = 1

MANIFESTS = (f"{TRAIN}.jsonl", f"{VAL}.jsonl")

KEPT = ("prompts", "activity", "source_group", "split", "weight")
"""Fields of an edited line that are kept; the others follow from the source and the settings."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Record of the captions that `prepare` read.

    Attributes:
        command: Command that reads them again.
        since_ns: Time before the first caption was read.
        tables: SHA-256 of each table's bytes, by table.
        sidecars: True if .txt files beside the sources were read as captions.
        prefix: Words put before every caption.
    """

    command: str
    since_ns: int
    tables: Mapping[str, str]
    sidecars: bool
    prefix: str


@dataclass(frozen=True, slots=True)
class Edits:
    """Differences between the manifests of a folder and those that `prepare` last wrote there.

    Attributes:
        changed: Lines that differ; without a record, all lines.
        added: Lines of clips that `prepare` did not make.
        removed: Clips without a line.
        bad: Lines that cannot be read.
        recorded: True if there is a record; earlier releases did not write one.
    """

    changed: Mapping[str, Clip]
    added: Mapping[str, Clip]
    removed: frozenset[str]
    bad: tuple[BadLine, ...]
    recorded: bool

    def __bool__(self) -> bool:
        return bool(self.changed or self.added or self.removed or self.bad)

    def __str__(self) -> str:
        if not self.recorded:
            return f"{count(len(self.changed), 'line')} without a record; release 0.1.0 kept none"
        return (
            f"{count(len(self.changed), 'line')} changed, {len(self.added):,} added, "
            f"{len(self.removed):,} removed, {len(self.bad):,} not readable"
        )


def reading_of(
    tables: Sequence[Path], *, command: str, since_ns: int, sidecars: bool, prefix: str
) -> Reading:
    """Describe how captions were read; tables that are gone meanwhile are left out."""
    known = {str(path.absolute()): _sha256(path) for path in tables if path.is_file()}
    return Reading(command, since_ns, known, sidecars=sidecars, prefix=prefix)


def find_edits(folder: Path) -> Edits:
    """Compare the manifests of a folder with the record of `prepare`; missing ones are ignored."""
    record = _read(folder)
    files = [folder / name for name in MANIFESTS if (folder / name).is_file()]
    accepted = record.get("files", {})
    if all(_sha256(path) in accepted.get(path.name, ()) for path in files):
        return Edits({}, {}, frozenset(), (), recorded=True)
    written: Mapping[str, str] = record.get("lines", {})
    changed, added, bad, seen = {}, {}, [], dict[str, Clip]()
    for line, found in _lines(files):
        if isinstance(found, BadLine):
            bad.append(found)
            continue
        clip = found
        known = seen.get(clip.clip_id)
        if known is not None:  # repeated lines count as weight
            clip = replace(known, weight=known.weight + clip.weight)
        seen[clip.clip_id] = clip
        if record and clip.clip_id not in written:
            added[clip.clip_id] = clip
        elif known is not None or written.get(clip.clip_id) != digest(line):
            changed[clip.clip_id] = clip
    whole = accepted.keys() <= {path.name for path in files}  # a deleted file is made again
    removed = written.keys() - seen.keys() if whole else set()
    return Edits(changed, added, frozenset(removed), tuple(bad), recorded=bool(record))


def compare_without_record(edits: Edits, *made: Sequence[Clip]) -> Edits:
    """Return no edits if the lines without a record equal those of one of the manifests `made`.

    Fields that release 0.1.0 did not write are not compared.

    Args:
        edits: Edits found without a record, so that all lines are in `changed`.
        made: Manifests that this release or 0.1.0 makes.
    """
    if edits.recorded or edits.bad:
        return edits
    for clips in made:
        now = {clip.clip_id: clip for clip in clips}
        if edits.changed.keys() == now.keys() and not any(
            _is_edited(clip, now[clip_id]) for clip_id, clip in edits.changed.items()
        ):
            return Edits({}, {}, frozenset(), (), recorded=False)
    return edits


def _is_edited(clip: Clip, made: Clip) -> bool:
    weight = made.weight if clip.weight == 1 else clip.weight
    before = replace(clip, weight=weight)
    return _cut_differs(clip, made) or any(
        getattr(before, name) != getattr(made, name) for name in KEPT
    )


def keep(clips: Sequence[Clip], edits: Edits) -> tuple[list[Clip], list[str]]:
    """Carry edits over to the clips that `prepare` made now.

    Returns:
        The clips, and notes on what was kept and what was not.
    """
    made = {clip.clip_id: clip for clip in clips}
    edited = {**edits.added, **edits.changed}
    merged = [
        replace(clip, **{name: getattr(edited[clip.clip_id], name) for name in KEPT})
        if clip.clip_id in edited
        else clip
        for clip in clips
        if clip.clip_id not in edits.removed
    ]
    merged += [clip for clip_id, clip in edits.added.items() if clip_id not in made]
    notes = [f"edits kept: {edits}"]
    if lost := len(edits.changed.keys() - made.keys()):
        notes.append(f"{lost:,} edited lines are of clips that are not made any more; left out")
    if other := sum(_cut_differs(clip, made[i]) for i, clip in edited.items() if i in made):
        notes.append(f"{other:,} edited lines had another start, size or frame rate; not kept")
    return merged, notes


def _cut_differs(edited: Clip, made: Clip) -> bool:
    names = ("start_s", "fps", "num_frames", "height", "width")
    return edited.kind == made.kind and (
        any(getattr(edited, name) != getattr(made, name) for name in names)
        or any(made.transform.get(rule) != value for rule, value in edited.transform.items())
    )


def without_edits(
    written: Sequence[Clip], made: Sequence[Clip], removed: Collection[str]
) -> list[Clip]:
    """Return the clips of a manifest as `prepare` makes them: the reference for later edits.

    Args:
        written: Clips of the manifest.
        made: Clips before edits were carried over.
        removed: Clips that a person removed; they stay in the reference, to stay removed.
    """
    as_written = {clip.clip_id: clip for clip in written}
    return [
        replace(as_written.get(clip.clip_id, clip), **{name: getattr(clip, name) for name in KEPT})
        for clip in made
        if clip.clip_id in as_written or clip.clip_id in removed
    ]


def back_up(folder: Path) -> list[Path]:
    """Copy the manifests of a folder to names that are free, `train.jsonl.bak`."""
    copies = []
    for path in (folder / name for name in MANIFESTS):
        if path.is_file():
            names = (f"{path.name}.{n}bak" for n in ("", *(f"{k}." for k in range(2, 10_000))))
            copy = next(path.with_name(name) for name in names if not path.with_name(name).exists())
            shutil.copy2(path, copy)
            copies.append(copy)
    return copies


def announce(folder: Path, files: Mapping[str, bytes]) -> None:
    """Accept the present manifests and those about to be written, so that a kill is not an edit."""
    record = _read(folder)
    accepted = dict(record.get("files", {}))
    for name, data in files.items():
        path = folder / name
        there = [_sha256(path)] if path.is_file() else []
        accepted[name] = [*there, hashlib.sha256(data).hexdigest()]
    write_json(folder / NAME, {**record, "version": VERSION, "files": accepted})


def write_record(
    folder: Path, files: Mapping[str, bytes], clips: Sequence[Clip], reading: Reading
) -> None:
    """Record the manifests that were written.

    Args:
        folder: Folder of the manifests.
        files: Bytes of the manifests, by name; empty if they hold edits, which are found line by
            line.
        clips: Clips that `prepare` made, without any edits that were kept.
        reading: Record of the captions that were read.
    """
    write_json(
        folder / NAME,
        {
            "version": VERSION,
            "files": {name: [hashlib.sha256(data).hexdigest()] for name, data in files.items()},
            "lines": {clip.clip_id: digest(encode_text(line_of(clip))) for clip in clips},
            "command": reading.command,
            "since_ns": reading.since_ns,
            "tables": dict(reading.tables),
            "sidecars": reading.sidecars,
            "prefix": reading.prefix,
        },
    )


def unused_captions(manifests: Sequence[Path], clips: Iterable[Clip]) -> tuple[list[str], str]:
    """List captions that were edited after `prepare` read them.

    A line of the manifest that a person edited is their own, and its caption file is not compared.

    Args:
        manifests: Manifests or their folders.
        clips: Clips of these manifests.

    Returns:
        The changed tables and captions, and the command that reads them; empty without any.
    """
    found: list[str] = []
    command = ""
    clips = list(clips)
    files = manifest.files(manifests)
    for folder in sorted({path.parent for path in files}):
        record = _read(folder)
        own = _changed_tables(record)
        if record.get("sidecars"):
            known = [clip for clip in clips if clip.clip_id in record["lines"]]
            own += _changed_sidecars(record, [p for p in files if p.parent == folder], known)
        if own:
            found += own
            command = str(record.get("command", ""))
    return found, command


def _changed_tables(record: Mapping[str, Any]) -> list[str]:
    tables = {Path(name): sha for name, sha in record.get("tables", {}).items()}
    return [str(path) for path, sha in tables.items() if path.is_file() and _sha256(path) != sha]


def _changed_sidecars(
    record: Mapping[str, Any], manifests: Sequence[Path], clips: Sequence[Clip]
) -> list[str]:
    since, prefix = int(record["since_ns"]), str(record["prefix"])
    sources = {clip.clip_id: _original(clip) for clip in clips}
    later = {path: _text_since(path, since) for path in dict.fromkeys(sources.values())}
    found: dict[str, str] = {}
    for clip in clips:
        text = later[sources[clip.clip_id]]
        if text is not None and not {text, f"{prefix} {text}".strip()} & set(clip.prompts):
            found[clip.clip_id] = (
                f"{sources[clip.clip_id].with_suffix('.txt')}: {shorten(text, 60)}"
            )
    if not found:
        return []
    by_prepare = {
        clip.clip_id
        for line, clip in _lines(manifests)
        if isinstance(clip, Clip) and record["lines"].get(clip.clip_id) == digest(line)
    }
    return list(dict.fromkeys(text for clip_id, text in found.items() if clip_id in by_prepare))


def _original(clip: Clip) -> Path:
    """Source that a clip was cut from; for clips of `--materialize`, the original source."""
    written = clip.orig.get("source")
    if clip.kind != "npz" or not isinstance(written, str):
        return clip.path
    return absolute(clip.path.parent.parent / written)


def _text_since(source: Path, since_ns: int) -> str | None:
    """Caption beside a source if it was written after a time; None also if it cannot be read."""
    sidecar = existing_spelling(source.with_suffix(".txt"))
    try:
        return sidecar_text(source) if sidecar.stat().st_mtime_ns > since_ns else None
    except (OSError, ValueError):
        return None


def digest(line: bytes) -> str:
    """Name the content of a line."""
    return hashlib.sha256(line.strip()).hexdigest()[:16]


def _lines(paths: Collection[Path]) -> Iterator[tuple[bytes, Clip | BadLine]]:
    for path in paths:
        for where, line in manifest.lines(path):
            try:
                yield line, parse_line(line, path, where)
            except ManifestError as error:
                yield line, BadLine(where, str(error))


def _read(folder: Path) -> dict[str, Any]:
    """Read the record; None if it is missing, damaged or of another version."""
    try:
        record = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return record if record["version"] == VERSION else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
