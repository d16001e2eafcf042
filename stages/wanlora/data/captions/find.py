"""Sources and their captions, as people write them.

Owns: the captions of each source, from .txt sidecars and tables, and what contradicts. Opens no
video. The walk is in `folders`, the reading of tables in `tables`, the names of columns
in `data.columns`.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanlora.core.shares import weight_problem
from wanlora.core.text import decode_utf8, shorten
from wanlora.data import columns
from wanlora.data.captions import tables
from wanlora.data.captions.folders import IMAGE_SUFFIXES, Failure, absolute, sources_in
from wanlora.data.captions.lookup import Lookup
from wanlora.errors import ManifestError, NoCaptionError
from wanlora.files import existing_spelling

SHOWN = 3
"""Rows that name no source, in the message about missing captions."""


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


@dataclass(frozen=True, slots=True)
class Found:
    """Sources with captions.

    Attributes:
        sources: Sorted by path.
        failures: Sources and rows that cannot be used.
        rows_elsewhere: Number of rows about files outside the sources given.
        images_unused: Number of images beside videos, or without a caption among sources that
            have one: thumbnails more often than data.
        ours: Number of files that `prepare --materialize` wrote, which are not sources.
        tables: Tables of captions that were read.
    """

    sources: list[Source]
    failures: list[Failure]
    rows_elsewhere: int
    images_unused: int
    ours: int
    tables: list[Path]


@dataclass(slots=True)
class _Notes:
    """Everything that is written about one file.

    Attributes:
        problem: Contradiction; the source is then not used.
    """

    prompts: dict[str, None] = field(default_factory=dict)  # a set that keeps the order
    activity: str | None = None
    group: str | None = None
    split: str | None = None
    problem: str | None = None
    weights: dict[tuple[Path, tuple[str, ...]], float] = field(default_factory=dict)
    """Sum over the rows of one table with the same captions. Equal rows of two tables do not add
    up: the tables are copies of one list."""
    no_caption: str | None = None
    """Message about a row without a column of a caption."""
    weighted: set[tuple[Path, tuple[str, ...]]] = field(default_factory=set)
    """Keys of `weights` whose rows have a weight column; they count before the others."""

    @property
    def weight(self) -> float:
        return max((self.weights[key] for key in self.weighted or self.weights), default=1.0)


@dataclass(slots=True)
class _Collected:
    """Content of tables.

    Attributes:
        notes: By source.
        failures: Bad rows, and rows about missing files.
        elsewhere: Number of rows about files outside the sources given.
        unmatched: Rows that name no source: where, the path as written, the path looked for.
    """

    notes: dict[Path, _Notes] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    elsewhere: int = 0
    unmatched: list[tuple[str, str, Path]] = field(default_factory=list)


def find(
    given: Sequence[Path], captions: Path | None, *, ours: Callable[[Path], bool] = lambda _: False
) -> Found:
    """Find sources and their captions.

    With a captions file, all other captions are ignored. Without one, each source has a .txt beside
    it, or rows in a table (`tables.NAMES`) of a folder searched; if that gives no caption at all,
    tables in the folder above are read. An image counts when a row names it, when it has a .txt
    that no video shares, or when there is no video in its folder.

    Args:
        given: Folders, searched to the bottom, or single files.
        captions: JSONL, JSON or CSV; paths in it are relative to its folder or to a folder given,
            those in other tables to the table's folder alone.
        ours: Whether a file below a folder given was written by `prepare` and is not a source.

    Raises:
        NoCaptionError: No source has a caption.
        ManifestError: A folder is missing or holds no video, or a table cannot be read.
    """
    files = sources_in(given, ours=ours)
    paths = files.paths
    sidecars = {path.with_suffix(".txt") for path in paths}
    found_tables = [captions] if captions is not None else _tables_beside(given, paths, sidecars)
    collected = _collect(found_tables, given, paths, sidecars, anywhere=captions is not None)
    notes = collected.notes
    beside = {p for p in _thumbnails(paths) if p not in notes} - set(map(absolute, given))
    unreadable: dict[Path, str] = {}
    if captions is None:
        unreadable = _read_sidecars((p for p in paths if p not in beside), notes)
        if not unreadable and not any(note.prompts for note in notes.values()):
            above = _tables_above(given, sidecars)
            found_tables += above
            collected = _collect(found_tables, given, paths, sidecars, anywhere=bool(above))
            notes = collected.notes
    sources, silent = [], []
    for path in paths:
        note = notes.get(path, _Notes())
        if note.problem:
            silent.append(path)
            unreadable[path] = note.problem
        elif note.prompts:
            activity = note.activity or path.parent.name
            sources.append(
                Source(path, tuple(note.prompts), activity, note.group, note.split, note.weight)
            )
        elif path not in beside:
            silent.append(path)
            if note.no_caption:
                unreadable[path] = note.no_caption
    failures = [*files.failures, *collected.failures.values()]
    if not sources:
        raise NoCaptionError(_no_caption(files.paths, failures, unreadable, collected, captions))
    films = any(not _is_image(source.path) for source in sources)
    thumbnails = [p for p in silent if films and _is_image(p) and p not in unreadable]
    failures += [
        Failure("no_caption", f"{p}: {unreadable.get(p) or _where_captions(captions)}", str(p))
        for p in silent
        if p not in thumbnails
    ]
    failures.sort(key=lambda failure: failure.path)
    return Found(
        sources, failures, collected.elsewhere, len(beside) + len(thumbnails), files.ours,
        found_tables,
    )  # fmt: skip


def _no_caption(
    paths: Sequence[Path],
    failures: Sequence[Failure],
    unreadable: Mapping[Path, str],
    collected: _Collected,
    captions: Path | None,
) -> str:
    """Reason why no source has a caption; rows that name none of them are the likeliest."""
    num_files = len(paths) + sum(failure.code == "unreadable" for failure in failures)
    start = f"none of {num_files} source files has a caption: "
    unmatched = collected.unmatched
    if unmatched and paths:
        shown = [
            f"  {w}: {shorten(name)}, looked for {path}" for w, name, path in unmatched[:SHOWN]
        ]
        return "\n".join(
            [
                f"{start}{len(unmatched):,} rows of captions name other files. The first are",
                *shown,
                f"the sources are, for example, {paths[0]}; correct the paths in the rows",
            ]
        )
    reasons = [*unreadable.values(), *(failure.message for failure in failures)]
    return start + next(iter(reasons), _where_captions(captions))


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


def _tables_beside(given: Sequence[Path], paths: Sequence[Path], sidecars: set[Path]) -> list[Path]:
    """List the tables in the folders given, in those below, and beside single files."""
    inner = {path.parent for path in paths}
    folders = set(inner)
    for path in map(absolute, given):
        if path.is_dir():
            folders.add(path)
            folders |= {f for folder in inner for f in folder.parents if f.is_relative_to(path)}
    return sorted(table for folder in folders for table in tables.in_folder(folder, sidecars))


def _tables_above(given: Sequence[Path], sidecars: set[Path]) -> list[Path]:
    """List the tables one level above the folders given."""
    above = {path.parent for path in map(absolute, given) if path.is_dir()}
    return sorted(table for folder in above for table in tables.in_folder(folder, sidecars))


def _collect(
    found_tables: Sequence[Path],
    given: Sequence[Path],
    paths: Sequence[Path],
    sidecars: set[Path],
    *,
    anywhere: bool,
) -> _Collected:
    """Gather the rows of tables by source.

    Args:
        found_tables: The tables.
        given: Folders or files given.
        paths: The sources.
        sidecars: Captions of single videos.
        anywhere: Whether a path may start at a folder given. A table that was found beside videos
            is about these alone: elsewhere, a file of the same name may be another one.

    Raises:
        ManifestError: A table cannot be read.
    """
    collected = _Collected()
    folders = [path for path in map(absolute, given) if path.is_dir()]
    lookup = Lookup(paths, folders if anywhere else [])
    for table in found_tables:
        for where, row in tables.read(table, sidecars):
            try:
                if isinstance(row, ManifestError):
                    raise row
                _read_row(row, table, where, collected, lookup, has_folders=bool(folders))
            except ManifestError as error:
                collected.failures[where] = Failure("bad_line", str(error), where)
    return collected


def _read_row(
    row: Mapping[str, Any],
    table: Path,
    where: str,
    collected: _Collected,
    lookup: Lookup,
    *,
    has_folders: bool,
) -> None:
    name = columns.path_in(row, where)
    path, candidates = lookup(name, table, where)
    if path is not None:
        _add(collected.notes.setdefault(path, _Notes()), row, where, table=table)
        return
    collected.unmatched.append((where, name, candidates[0]))
    # Path.is_file raises for a path that the system refuses; this is False for it.
    if any(map(os.path.isfile, candidates)) or not has_folders:
        collected.elsewhere += 1
    else:
        message = f"{where}: there is no file {candidates[0]}"
        collected.failures[str(candidates[0])] = Failure("missing", message, str(candidates[0]))


def _add(note: _Notes, row: Mapping[str, Any], where: str, *, table: Path) -> None:
    captions = columns.captions_in(row, where)
    if not row.keys() & set(columns.CAPTION_NAMES):
        note.no_caption = (
            f"{where}: no column of a caption; found {columns.describe(row)}, expected one of "
            f"{', '.join(columns.CAPTION_NAMES)}"
        )
    activity = columns.text_in(row, columns.ACTIVITY_NAMES, where)
    group = columns.text_in(row, columns.GROUP_NAMES, where)
    split = columns.split_in(row, where)
    own = columns.weight_in(row, where)
    weight = note.weights.get((table, captions), 0.0) + (1.0 if own is None else own)
    if problem := weight_problem(weight):
        raise ManifestError(f"{where}: the rows of this file weigh {weight:g} in all; {problem}")
    # Nothing of a bad row is kept: all checks are above.
    note.weights[table, captions] = weight
    if own is not None:
        note.weighted.add((table, captions))
    note.prompts.update(dict.fromkeys(captions))
    note.activity = _agreed(note, "activity", note.activity, activity, where)
    note.group = _agreed(note, "source_group", note.group, group, where)
    note.split = _agreed(note, "split", note.split, split, where)


def _agreed(
    note: _Notes, name: str, before: str | None, value: str | None, where: str
) -> str | None:
    """Return the value that rows of one file agree on; a contradiction is a problem of the file."""
    if before is not None and value is not None and value != before:
        note.problem = (
            f"{where}: {name} {shorten(value)} disagrees with {shorten(before)} in another row of "
            "this file"
        )
    return before if value is None else value


def _read_sidecars(paths: Iterable[Path], notes: dict[Path, _Notes]) -> dict[Path, str]:
    """Add the captions of .txt files, and return what is wrong with those that cannot be read."""
    problems: dict[Path, str] = {}
    for path in paths:
        try:
            text = sidecar_text(path)
        except (OSError, ValueError) as error:
            problems[path] = f"{path.with_suffix('.txt').name} cannot be read: {error}"
            continue
        if text is None:
            continue
        note = notes.setdefault(path, _Notes())
        if note.prompts and text not in note.prompts:
            note.problem = (
                f"it has a caption in {path.with_suffix('.txt').name} and another in a table: "
                f"{shorten(text)} against {shorten(next(iter(note.prompts)))}; remove one, or use "
                "one file with --captions"
            )
        note.prompts[text] = None
    return problems


def sidecar_text(path: Path) -> str | None:
    """Caption in the .txt beside a source; None when there is no such file or it is blank.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not UTF-8 text.
    """
    sidecar = existing_spelling(path.with_suffix(".txt"))
    if sidecar == path or not sidecar.is_file():
        return None
    text = decode_utf8(sidecar.read_bytes()).strip()
    return text if columns.is_caption(text) else None


def _where_captions(captions: Path | None) -> str:
    if captions is not None:
        return f"no caption in {captions}; each row needs a path and a caption"
    return (
        "no caption; put one in a .txt of the same name beside it, in a metadata.jsonl or "
        "metadata.csv in its folder, or in a file given by --captions"
    )
