"""Sources and their captions, as people write them.

Owns: the choice of sources, and the reason for each file left out. Opens no video.
Must not know: the search of folders (`folders`), tables (`collect`), sidecars and columns
(`notes`).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wanlora.core.text import shorten
from wanlora.core.units import first
from wanlora.data.captions.collect import Collected, collect, tables_above, tables_beside
from wanlora.data.captions.folders import IMAGE_SUFFIXES, Failure, absolute, sources_in
from wanlora.data.captions.notes import Notes, read_sidecars
from wanlora.errors import NoCaptionError

SHOWN = 3
"""Rows that name no source, in the message about missing captions."""


@dataclass(frozen=True, slots=True)
class Source:
    """A source file and what was written about it.

    Attributes:
        path: Absolute path; symbolic links are not resolved.
        prompts: Captions in the order found.
        activity: Value of the activity column, else the name of the folder.
        group: Value of the group column, else None.
        split: train or val from the split column, else None.
        weight: Value of the weight column, multiplied by the number of equal rows in one table.
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
        sources: Sources, sorted by path.
        failures: Sources and rows that cannot be used.
        rows_elsewhere: Number of rows about files outside the sources given.
        images_unused: Number of images beside videos, or without a caption if other sources have
            one; they are usually thumbnails.
        ours: Number of files that `prepare --materialize` wrote, which are not sources.
        tables: Tables of captions that were read.
    """

    sources: list[Source]
    failures: list[Failure]
    rows_elsewhere: int
    images_unused: int
    ours: int
    tables: list[Path]


def find(
    given: Sequence[Path], captions: Path | None, *, ours: Callable[[Path], bool] = lambda _: False
) -> Found:
    """Find sources and their captions.

    With a captions file, all other captions are ignored. Without one, each source has a .txt beside
    it, or rows in a table (`tables.NAMES`) of a folder searched; if that gives no caption at all,
    tables in the folder above are read. An image counts when a row names it, when it has a .txt
    that no video shares, or when there is no video in its folder.

    Args:
        given: Folders, searched with all subfolders, or single files.
        captions: JSONL, JSON or CSV file; paths in it are relative to its folder or to a given
            folder, and paths in other tables only to the table's folder.
        ours: Predicate for files that `prepare` wrote, which are not sources.

    Raises:
        NoCaptionError: No source has a caption.
        ManifestError: A folder is missing or holds no video, or a table cannot be read.
    """
    files = sources_in(given, ours=ours)
    paths = files.paths
    read, collected, beside, problems = _read_captions(given, paths, captions)
    sources, silent = _sort_out(paths, collected.notes, problems, beside)
    failures = [*files.failures, *collected.failures.values()]
    if not sources:
        raise NoCaptionError(_no_caption(paths, failures, problems, collected, captions))
    has_videos = any(not _is_image(source.path) for source in sources)
    thumbnails = [p for p in silent if has_videos and _is_image(p) and p not in problems]
    failures += [
        Failure("no_caption", f"{p}: {problems.get(p) or _where_captions(captions)}", str(p))
        for p in silent
        if p not in thumbnails
    ]
    return Found(
        sources=sources,
        failures=sorted(failures, key=lambda failure: failure.path),
        rows_elsewhere=collected.elsewhere,
        images_unused=len(beside) + len(thumbnails),
        ours=files.ours,
        tables=read,
    )


def _read_captions(
    given: Sequence[Path], paths: Sequence[Path], captions: Path | None
) -> tuple[list[Path], Collected, set[Path], dict[Path, str]]:
    """Read the tables and sidecars of sources.

    Returns:
        The tables; their content, with that of sidecars; images beside videos without a caption;
        and reasons why sidecars cannot be read or used.
    """
    sidecars = {path.with_suffix(".txt") for path in paths}
    read = [captions] if captions is not None else tables_beside(given, paths, sidecars)
    collected = collect(read, given, paths, sidecars, anywhere=captions is not None)
    beside = {p for p in _thumbnails(paths) if p not in collected.notes} - set(map(absolute, given))
    if captions is not None:
        return read, collected, beside, {}
    problems = read_sidecars((p for p in paths if p not in beside), collected.notes)
    if not problems and not any(note.prompts for note in collected.notes.values()):
        above = tables_above(given, sidecars)
        read += above
        collected = collect(read, given, paths, sidecars, anywhere=bool(above))
    return read, collected, beside, problems


def _sort_out(
    paths: Sequence[Path],
    notes: Mapping[Path, Notes],
    problems: dict[Path, str],
    beside: Collection[Path],
) -> tuple[list[Source], list[Path]]:
    """Divide files into sources with captions and files without.

    Args:
        paths: All files.
        notes: Captions and columns of each file.
        problems: Reasons why a file has no caption; those of contradictory notes are added.
        beside: Images beside videos, which need no caption.
    """
    sources, silent = [], []
    for path in paths:
        note = notes.get(path, Notes())
        if note.problem:
            silent.append(path)
            problems[path] = note.problem
        elif note.prompts:
            activity = note.activity or path.parent.name
            sources.append(
                Source(path, tuple(note.prompts), activity, note.group, note.split, note.weight)
            )
        elif path not in beside:
            silent.append(path)
            if note.no_caption:
                problems[path] = note.no_caption
    return sources, silent


def _no_caption(
    paths: Sequence[Path],
    failures: Sequence[Failure],
    problems: Mapping[Path, str],
    collected: Collected,
    captions: Path | None,
) -> str:
    """Reason why no source has a caption; rows that name none of them are the likeliest."""
    num_files = len(paths) + sum(failure.code == "unreadable" for failure in failures)
    start = f"none of {num_files} source files has a caption: "
    unmatched = collected.unmatched
    if unmatched and paths:
        rows = [f"{at}: {shorten(name)}, looked for {path}" for at, name, path in unmatched]
        return "\n".join(
            [
                f"{start}{len(unmatched):,} rows of captions name other files:",
                *first(rows, "the captions", most=SHOWN),
                f"the sources are, for example, {paths[0]}; correct the paths in the rows",
            ]
        )
    reasons = [*problems.values(), *(failure.message for failure in failures)]
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


def _where_captions(captions: Path | None) -> str:
    if captions is not None:
        return f"no caption in {captions}; each row needs a path and a caption"
    return (
        "no caption; put one in a .txt of the same name beside it, in a metadata.jsonl or "
        "metadata.csv in its folder, or in a file given by --captions"
    )
