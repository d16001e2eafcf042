"""Paths of sources: in a manifest and on this machine.

Owns: the written form of a path, and the folders that a relative path may start at.
Must not know: the other fields of a line.

A relative path is relative to the manifest's folder, never to the working directory. In a line
that wanlora did not write it may also be relative to a folder above (`data/processed/clips/a.npz`
in `data/processed/train.jsonl`): the nearest folder with that file counts.
"""

import os
from functools import lru_cache
from pathlib import Path

from wanlora.core.text import spellings
from wanlora.files import existing_spelling


def written_path(source: Path, folder: Path) -> str:
    """Path of a source as a manifest in `folder` names it; valid from any working directory.

    Relative if both are in one project (`../../videos/walk.mp4`), so a project can be moved as a
    whole; absolute otherwise.
    """
    source, folder = _absolute(source), _absolute(folder)
    near = source.is_relative_to(folder.parent) and folder.parent != Path(folder.anchor)
    if near or _in_one_project(source.parent, folder):
        return Path(os.path.relpath(source, folder)).as_posix()
    return str(source)


@lru_cache(maxsize=1024)
def _in_one_project(first: Path, second: Path) -> bool:
    """Return whether two folders have a parent below the root and the user's home.

    False if there is a symbolic link between that parent and one of the folders: the relative path
    from the link's target would be different.
    """
    common = Path(os.path.commonpath([first, second]))
    home = Path(os.path.expanduser("~"))  # noqa: PTH111  (Path.home raises without one)
    if common == Path(common.anchor) or home.is_relative_to(common):
        return False
    real = Path(os.path.realpath(common))
    return all(
        real / folder.relative_to(common) == Path(os.path.realpath(folder))
        for folder in (first, second)
    )


def source_path(written: str, folder: Path) -> Path:
    """Absolute path of a source that a manifest in `folder` names."""
    return _absolute(existing_spelling(_absolute(folder / written)))


def plain_source_path(source: str, manifest: Path) -> Path:
    """Absolute path of a source that a line of a plain .npz data set names."""
    folder = _absolute(manifest.parent)
    candidates = [
        _absolute(above / name) for above in (folder, *folder.parents) for name in spellings(source)
    ]
    # Path.is_file raises for a path that the system refuses; this is False for it.
    return next((path for path in candidates if os.path.isfile(path)), candidates[0])  # noqa: PTH113


def _absolute(path: Path) -> Path:
    """Absolute and without `..`, but with symbolic links kept: a link's name may be the clip's."""
    return Path(os.path.abspath(path))  # noqa: PTH100  (Path.resolve follows links)
