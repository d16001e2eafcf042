"""Which videos there are, and what they show, in the words of people.

Owns: finding source files in folders, and captions in .txt sidecars, JSONL, JSON and CSV. Opens no
video. What a column may be called stands in `core.rows`.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from wanlora.core import rows
from wanlora.errors import ManifestError

VIDEO_SUFFIXES = frozenset(
    {
        ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".ts", ".mts", ".m2ts",
        ".mpg", ".mpeg", ".3gp", ".ogv",
    }
)  # fmt: skip
SOURCE_SUFFIXES = VIDEO_SUFFIXES | {".npz"}
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True, slots=True)
class Source:
    """A source file and what was written about it.

    Attributes:
        path: Absolute, symbolic links kept.
        prompts: Captions in the order found.
        activity: A column of that meaning, else the name of the folder.
        group: A column of that meaning, else None.
    """

    path: Path
    prompts: tuple[str, ...]
    activity: str
    group: str | None


class Failure(NamedTuple):
    """A line of errors.jsonl: one source that gives no clip, and why."""

    code: str
    message: str
    path: str


@dataclass(frozen=True, slots=True)
class Found:
    """Sources sorted by path, those that cannot be used, and how many rows name other files."""

    sources: list[Source]
    failures: list[Failure]
    rows_elsewhere: int


@dataclass(slots=True)
class _Notes:
    """Everything the rows about one file say."""

    prompts: dict[str, None] = field(default_factory=dict)  # a set that keeps the order
    activity: str | None = None
    group: str | None = None


def find(given: Sequence[Path], captions: Path | None) -> Found:
    """Find sources and their captions.

    With a captions file, it alone is believed. Without one, each source has a .txt beside it, or
    rows in a metadata.jsonl or metadata.csv of a folder searched.

    Args:
        given: Folders, searched to the bottom, or single files.
        captions: JSONL, JSON or CSV; paths in it are relative to its folder or to a folder given.

    Raises:
        ManifestError: A folder is missing, holds no video, nothing has a caption, or two places
            disagree about one file.
    """
    paths = _sources_in(given)
    tables = [captions] if captions is not None else _metadata_beside(given, paths)
    notes, absent, elsewhere = _collect(tables, given, set(paths))
    unreadable = _read_sidecars(paths, notes) if captions is None else {}
    sources, failures = [], absent
    for path in paths:
        note = notes.get(path, _Notes())
        if note.prompts:
            activity = note.activity or path.parent.name
            sources.append(Source(path, tuple(note.prompts), activity, note.group))
        else:
            reason = unreadable.get(path) or _where_captions(captions)
            failures.append(Failure("no_caption", f"{path}: {reason}", str(path)))
    if not sources:
        raise ManifestError(
            f"none of {len(paths)} source files has a caption: {_where_captions(captions)}"
        )
    return Found(sources, sorted(failures, key=lambda failure: failure.path), elsewhere)


def read_table(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (`file:line`, row) of a JSONL, JSON or CSV file.

    Raises:
        ManifestError: The file is missing or is not what its suffix says.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ManifestError(f"no captions file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"captions file {path} cannot be read: {error}") from None
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise ManifestError(f"captions file {path}: expected .jsonl, .json or .csv")
    return readers[path.suffix.lower()](path, text)


def _read_jsonl(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", rows.json_object(line, f"{path}:{number}")


def _read_json(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read a list of rows, or an object from path to caption(s) or row."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ManifestError(f"{path} is not JSON: {error}") from None
    if isinstance(content, dict):
        content = [
            {"path": key, **(value if isinstance(value, dict) else {"caption": value})}
            for key, value in content.items()
        ]
    if not isinstance(content, list):
        raise ManifestError(f"{path}: expected a list of rows or an object, found {content!r:.60}")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise ManifestError(f"{path}: row {number} is {row!r:.60}; expected an object")
        yield f"{path}: row {number}", row


def _read_csv(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row:
                raise ManifestError(
                    f"{where}: more fields than the header has; quote a caption that holds commas"
                )
            yield where, row
    except csv.Error as error:
        raise ManifestError(f"{path}:{reader.line_num}: not CSV: {error}") from None


def _sources_in(given: Sequence[Path]) -> list[Path]:
    """Every source file once, sorted; a file given by name counts whatever its suffix is."""
    found: set[Path] = set()
    for path in map(_absolute, given):
        if path.is_dir():
            inside = set(_files_under(path, SOURCE_SUFFIXES))
            if not inside:
                known = " ".join(sorted(SOURCE_SUFFIXES))
                raise ManifestError(f"{path} holds no video; looked for {known}")
            found |= inside
        elif path.is_file():
            found.add(path)
        else:
            raise ManifestError(f"there is no video or folder at {path}")
    return sorted(found)


def _files_under(folder: Path, suffixes: Iterable[str]) -> Iterator[Path]:
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes:
                yield Path(root, name)


def _metadata_beside(given: Sequence[Path], paths: Sequence[Path]) -> list[Path]:
    """The metadata files in the folders given, in those below, and beside single files."""
    folders = {path.parent for path in paths}
    for path in map(_absolute, given):
        if path.is_dir():
            folders.add(path)
            folders |= {f for source in paths for f in source.parents if f.is_relative_to(path)}
    return sorted(
        folder / name for folder in folders for name in METADATA_NAMES if (folder / name).is_file()
    )


def _collect(
    tables: Sequence[Path], given: Sequence[Path], paths: set[Path]
) -> tuple[dict[Path, _Notes], list[Failure], int]:
    """Gather what tables say; apart, rows about files that are missing or not asked for."""
    notes: dict[Path, _Notes] = {}
    absent: dict[str, Failure] = {}
    elsewhere = 0
    folders = [path for path in map(_absolute, given) if path.is_dir()]
    for table in tables:
        for where, row in read_table(table):
            name = rows.path_in(row, where)
            candidates = [_absolute(base / name) for base in (table.parent, *folders)]
            path = next((c for c in candidates if c in paths), None)
            if path is not None:
                _add(notes.setdefault(path, _Notes()), row, where)
            elif any(candidate.is_file() for candidate in candidates) or not folders:
                elsewhere += 1
            else:
                message = f"{where}: there is no file {candidates[0]}"
                absent[name] = Failure("missing", message, str(candidates[0]))
    return notes, list(absent.values()), elsewhere


def _add(note: _Notes, row: Mapping[str, Any], where: str) -> None:
    note.prompts.update(dict.fromkeys(rows.captions_in(row, where)))
    note.activity = _agreed(note.activity, row, rows.ACTIVITY_NAMES, where)
    note.group = _agreed(note.group, row, rows.GROUP_NAMES, where)


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
        "no caption; put one in a .txt of the same name beside the video, in a metadata.jsonl or "
        "metadata.csv in its folder, or in a file given by --captions"
    )


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  (Path.resolve follows links)
