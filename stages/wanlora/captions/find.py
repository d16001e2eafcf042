"""Which videos there are, and what they show, in the words of people.

Owns: finding source files in folders, and their captions in .txt sidecars and tables. Opens no
video. How tables are read stands in `captions.tables`, what a column may be called in `core.rows`.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from wanlora.captions import tables
from wanlora.core import rows
from wanlora.errors import ManifestError

VIDEO_SUFFIXES = frozenset(
    {
        ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".ts", ".mts", ".m2ts",
        ".mpg", ".mpeg", ".m2v", ".vob", ".3gp", ".ogv", ".gif", ".mxf", ".asf", ".divx",
    }
)  # fmt: skip
CLIP_SUFFIXES = VIDEO_SUFFIXES | {".npz"}
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
SOURCE_SUFFIXES = CLIP_SUFFIXES | IMAGE_SUFFIXES


@dataclass(frozen=True, slots=True)
class Source:
    """A source file and what was written about it.

    Attributes:
        path: Absolute, symbolic links kept.
        prompts: Captions in the order found.
        activity: A column of that meaning, else the name of the folder.
        group: A column of that meaning, else None.
        split: train or val, when a column says so.
        weight: A column of that meaning, times the rows of one table that repeat each other.
    """

    path: Path
    prompts: tuple[str, ...]
    activity: str
    group: str | None
    split: str | None
    weight: float = 1.0


class Failure(NamedTuple):
    """A line of errors.jsonl: one source that gives no clip, and why."""

    code: str
    message: str
    path: str


@dataclass(frozen=True, slots=True)
class Found:
    """What there is to work on.

    Attributes:
        sources: Sorted by path.
        failures: Those that cannot be used.
        rows_elsewhere: Number of rows about files that were not asked for.
        images_unused: Number of images that stand beside videos, or have no caption among sources
            that have: thumbnails more often than data.
    """

    sources: list[Source]
    failures: list[Failure]
    rows_elsewhere: int
    images_unused: int


@dataclass(slots=True)
class _Notes:
    """Everything the rows about one file say."""

    prompts: dict[str, None] = field(default_factory=dict)  # a set that keeps the order
    activity: str | None = None
    group: str | None = None
    split: str | None = None
    weights: dict[tuple[Path, tuple[str, ...]], float] = field(default_factory=dict)
    """Sum over the rows of one table with the same captions. Equal rows of two tables do not add
    up: the tables are copies of one list."""
    weighted: set[tuple[Path, tuple[str, ...]]] = field(default_factory=set)
    """Keys of `weights` whose rows have a weight column; they count before the others."""

    @property
    def weight(self) -> float:
        return max((self.weights[key] for key in self.weighted or self.weights), default=1.0)


def find(given: Sequence[Path], captions: Path | None) -> Found:
    """Find sources and their captions.

    With a captions file, it alone is believed. Without one, each source has a .txt beside it, or
    rows in a table (`tables.NAMES`) of a folder searched. An image counts when a row names it, when
    it has a .txt that no video shares, or when no video lies in its folder.

    Args:
        given: Folders, searched to the bottom, or single files.
        captions: JSONL, JSON or CSV; paths in it are relative to its folder or to a folder given,
            those in other tables to the table's folder alone.

    Raises:
        ManifestError: A folder is missing, holds no video, nothing has a caption, or two places
            disagree about one file.
    """
    paths, unnamed = _nameable(_sources_in(given))
    found_tables = [captions] if captions is not None else _tables_beside(given, paths)
    notes, absent, elsewhere = _collect(
        found_tables, given, set(paths), beside_videos=captions is None
    )
    beside = {p for p in _thumbnails(paths) if p not in notes} - set(map(_absolute, given))
    unreadable: dict[Path, str] = {}
    if captions is None:
        unreadable = _read_sidecars((p for p in paths if p not in beside), notes)
    sources, silent = [], []
    for path in paths:
        note = notes.get(path, _Notes())
        if note.prompts:
            activity = note.activity or path.parent.name
            sources.append(
                Source(path, tuple(note.prompts), activity, note.group, note.split, note.weight)
            )
        elif path not in beside:
            silent.append(path)
    if not sources:
        reasons = [*unreadable.values(), *(failure.message for failure in unnamed)]
        reason = next(iter(reasons), _where_captions(captions))
        raise ManifestError(
            f"none of {len(paths) + len(unnamed)} source files has a caption: {reason}"
        )
    films = any(not _is_image(source.path) for source in sources)
    thumbnails = [p for p in silent if films and _is_image(p) and p not in unreadable]
    failures = [*unnamed, *absent] + [
        Failure("no_caption", f"{p}: {unreadable.get(p) or _where_captions(captions)}", str(p))
        for p in silent
        if p not in thumbnails
    ]
    failures.sort(key=lambda failure: failure.path)
    return Found(sources, failures, elsewhere, len(beside) + len(thumbnails))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _thumbnails(paths: Sequence[Path]) -> set[Path]:
    """Images beside videos without a .txt of their own."""
    videos = {path.with_suffix("") for path in paths if not _is_image(path)}
    folders = {video.parent for video in videos}
    return {
        path
        for path in paths
        if _is_image(path)
        and path.parent in folders
        and (path.with_suffix("") in videos or not path.with_suffix(".txt").is_file())
    }


def _sources_in(given: Sequence[Path]) -> list[Path]:
    """Every source file once, sorted; a file given by name counts whatever its suffix is."""
    found: set[Path] = set()
    for path in map(_absolute, given):
        if path.is_dir():
            inside = set(_files_under(path, SOURCE_SUFFIXES))
            if not inside:
                known = " ".join(sorted(SOURCE_SUFFIXES))
                raise ManifestError(f"{path} holds no video or image; looked for {known}")
            found |= inside
        elif path.is_file():
            found.add(path)
        else:
            raise ManifestError(f"there is no video or folder at {path}")
    return sorted(found)


def _nameable(paths: Sequence[Path]) -> tuple[list[Path], list[Failure]]:
    """Set apart the files whose path is no text: neither a manifest nor a page could name them."""
    named, failures = [], []
    for path in paths:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        if shown == str(path):
            named.append(path)
        else:
            message = f"{shown}: its name is not UTF-8; rename it"
            failures.append(Failure("unreadable", message, shown))
    return named, failures


def _files_under(folder: Path, suffixes: Iterable[str]) -> Iterator[Path]:
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes:
                yield Path(root, name)


def _tables_beside(given: Sequence[Path], paths: Sequence[Path]) -> list[Path]:
    """The tables in the folders given, in those below, and beside single files."""
    folders = {path.parent for path in paths}
    for path in map(_absolute, given):
        if path.is_dir():
            folders.add(path)
            folders |= {f for source in paths for f in source.parents if f.is_relative_to(path)}
    return sorted(table for folder in folders for table in tables.in_folder(folder))


def _collect(
    found_tables: Sequence[Path], given: Sequence[Path], paths: set[Path], *, beside_videos: bool
) -> tuple[dict[Path, _Notes], list[Failure], int]:
    """Gather what tables say; apart, rows about files that are missing or not asked for.

    A table that was found beside videos is about these alone: a path of it never starts at another
    folder given, where a file of the same name may be of somebody else.
    """
    notes: dict[Path, _Notes] = {}
    absent: dict[Path, Failure] = {}
    elsewhere = 0
    folders = [path for path in map(_absolute, given) if path.is_dir()]
    for table in found_tables:
        for where, row in tables.read(table):
            name = rows.path_in(row, where)
            bases = [table.parent, table.parent / "videos"]  # FastVideo's rows omit it
            bases += [] if beside_videos else folders
            candidates = [_absolute(base / name) for base in bases]
            path = next((c for c in candidates if c in paths), None)
            if path is not None:
                _add(notes.setdefault(path, _Notes()), row, where, table=table)
            elif any(candidate.is_file() for candidate in candidates) or not folders:
                elsewhere += 1
            else:
                message = f"{where}: there is no file {candidates[0]}"
                absent[candidates[0]] = Failure("missing", message, str(candidates[0]))
    return notes, list(absent.values()), elsewhere


def _add(note: _Notes, row: Mapping[str, Any], where: str, *, table: Path) -> None:
    captions = rows.captions_in(row, where)
    note.prompts.update(dict.fromkeys(captions))
    own = rows.weight_in(row, where)
    weight = note.weights.get((table, captions), 0.0) + (1.0 if own is None else own)
    if problem := rows.weight_problem(weight):
        raise ManifestError(f"{where}: the rows of this file weigh {weight:g} in all; {problem}")
    note.weights[table, captions] = weight
    if own is not None:
        note.weighted.add((table, captions))
    note.activity = _agreed(note.activity, row, rows.ACTIVITY_NAMES, where)
    note.group = _agreed(note.group, row, rows.GROUP_NAMES, where)
    split = rows.split_in(row, where)
    if note.split is not None and split not in (None, note.split):
        raise ManifestError(f"{where}: split {split} disagrees with another row of this file")
    note.split = split or note.split


def _agreed(
    before: str | None, row: Mapping[str, Any], names: Sequence[str], where: str
) -> str | None:
    value = rows.text_in(row, names, where)
    if before is not None and value is not None and value != before:
        raise ManifestError(
            f"{where}: {names[0]} {value!r} disagrees with {before!r} in another row of this file"
        )
    return value if value is not None else before


def _read_sidecars(paths: Iterable[Path], notes: dict[Path, _Notes]) -> dict[Path, str]:
    """Add the captions of .txt files; what is wrong with those that cannot be read comes back."""
    problems: dict[Path, str] = {}
    for path in paths:
        sidecar = path.with_suffix(".txt")
        if sidecar == path or not sidecar.is_file():
            continue
        try:
            text = sidecar.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            problems[path] = f"{sidecar.name} cannot be read as UTF-8: {error}"
            continue
        note = notes.setdefault(path, _Notes())
        if note.prompts and text and text not in note.prompts:
            raise ManifestError(
                f"{path} has a caption in {sidecar.name} and another in a metadata file: "
                f"{text!r:.80} against {next(iter(note.prompts))!r:.80}; remove one, or name the "
                "file to believe with --captions"
            )
        if text:
            note.prompts[text] = None
    return problems


def _where_captions(captions: Path | None) -> str:
    if captions is not None:
        return f"no caption in {captions}; each row needs a path and a caption"
    return (
        "no caption; put one in a .txt of the same name beside it, in a metadata.jsonl or "
        "metadata.csv in its folder, or in a file given by --captions"
    )


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  (Path.resolve follows links)
