"""Source files in folders: each folder once, real ones before links to them.

Owns: the walk, and the suffixes of sources. Opens no file.
"""

import errno
import os
import shlex
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

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
TABLE_SUFFIXES = frozenset({".jsonl", ".json", ".csv", ".tsv", ".txt"})
"""Suffixes of caption files; a file of that name is not a source."""


class Failure(NamedTuple):
    """A line of errors.jsonl: one source that gives no clip, and why."""

    code: str
    message: str
    path: str


@dataclass(slots=True)
class Files:
    """Source files.

    Attributes:
        paths: Absolute paths, sorted; links to files are kept because captions may use their names.
        failures: Files that cannot be named in a manifest, and folders that cannot be read.
        ours: Number of files that `prepare --materialize` wrote, which are not sources.
    """

    paths: list[Path] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    ours: int = 0


def sources_in(given: Sequence[Path], *, ours: Callable[[Path], bool]) -> Files:
    """Find every source file once; a file given by name counts unless it holds captions.

    A folder with several links to it is read once, under its own name if that is below a given
    folder. Links to files are separate sources: one file may be in two activities.

    Args:
        given: Folders, searched with all subfolders, or single files.
        ours: Predicate for files below the given folders that are not sources.

    Raises:
        ManifestError: A path is missing or a captions file, or a folder has no source file.
    """
    roots = [absolute(path) for path in given]
    for path in roots:
        if not path.exists():
            raise ManifestError(f"there is no video or folder at {path}")
        if path.suffix.lower() in TABLE_SUFFIXES and path.is_file():
            raise ManifestError(
                f"{path} holds captions, not a video; give the videos, and the captions by their "
                f"flag: wanlora prepare {shlex.quote(str(path.parent))} --captions "
                f"{shlex.quote(str(path))}"
            )
    files = Files()
    folders = [path for path in roots if path.is_dir()]
    found = {path for path in roots if not path.is_dir()}
    reached: dict[tuple[int, int], Path] = {}
    for root, names in _walk(folders, reached, files.failures):
        inside = [Path(root, name) for name in names if _is_source(name)]
        skipped = {path for path in inside if root not in folders and ours(path)}
        files.ours += len(skipped)
        found |= set(inside) - skipped
    _require_files(folders, found, reached)
    for path in sorted(found):
        shown = os.fsencode(path).decode(errors="backslashreplace")
        if shown == str(path):
            files.paths.append(path)
        else:
            message = f"{shown}: its name is not UTF-8; rename it"
            files.failures.append(Failure("unreadable", message, shown))
    return files


def absolute(path: Path) -> Path:
    """Absolute and without `..`, but with symbolic links kept: a link's name may be the clip's."""
    return Path(os.path.abspath(path))  # noqa: PTH100  (Path.resolve follows links)


def _is_source(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in SOURCE_SUFFIXES


def _walk(
    roots: Sequence[Path], reached: dict[tuple[int, int], Path], failures: list[Failure]
) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder and the names of the files in it; links to folders come last."""
    folders, links = deque(roots), deque[Path]()
    while folders or links:
        folder = (folders or links).popleft()
        try:
            stat = folder.stat()
            if (stat.st_dev, stat.st_ino) in reached:
                continue
            reached[stat.st_dev, stat.st_ino] = folder
            names = []
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if not _is_folder(entry):
                        names.append(entry.name)
                    elif not entry.name.startswith("."):
                        (links if entry.is_symlink() else folders).append(folder / entry.name)
        except OSError as error:
            message = f"{folder}: the folder cannot be read: {error.strerror}"
            failures.append(Failure("unreadable", message, str(folder)))
            continue
        yield folder, names


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    """Return whether an entry is a folder or a link to one; a link to itself is not."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _require_files(
    folders: Sequence[Path], found: set[Path], reached: dict[tuple[int, int], Path]
) -> None:
    own_names = set(reached.values())
    for folder in folders:
        prefix = f"{folder}{os.sep}"
        if folder in own_names and not any(str(path).startswith(prefix) for path in found):
            known = " ".join(sorted(SOURCE_SUFFIXES))
            raise ManifestError(f"{folder} holds no video or image; looked for {known}")
