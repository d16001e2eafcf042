"""Sources that were moved after `prepare`: on another machine, disk or system.

Owns: `--source-root`, which finds a source by the end of its written path. The manifest is not
changed, and keys come from the sources' bytes, so nothing is encoded again.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from wanlora.data import npz
from wanlora.data.clip import Clip
from wanlora.errors import ManifestError
from wanlora.files import existing_spelling

NUM_TRIED = 100
"""Number of sources whose paths decide how many leading folders are dropped. Each costs one disk
access per folder of its path."""

Parts = tuple[str, ...]


class Found(NamedTuple):
    """Clips with the paths of their sources now.

    Attributes:
        clips: All clips given.
        moved: Path found under a root, by path in the manifest.
    """

    clips: list[Clip]
    moved: dict[Path, Path]


def find_sources(clips: Sequence[Clip], roots: Sequence[Path]) -> Found:
    r"""Look for the sources that are not at their written path under other folders.

    `/home/me/videos/walking/a.mp4` or `C:\\Users\\me\\videos\\walking\\a.mp4` under `/mnt/clips` is
    `/mnt/clips/walking/a.mp4` if that file exists. The same number of leading folders is dropped
    for as many sources as possible, and as few as possible, so files with equal names in different
    folders are not confused.

    Args:
        clips: Clips from manifests.
        roots: Folders of sources; the first that has a source wins.

    Raises:
        ManifestError: A root is not a folder.
    """
    require_folders(roots)
    left = _lost(clips) if roots else {}
    moved: dict[Path, Path] = {}
    for root in roots:
        while found := _under(root.absolute(), left):
            moved |= found
            left = {path: parts for path, parts in left.items() if path not in found}
    return Found([_at(clip, moved.get(clip.path)) for clip in clips], moved)


def require_folders(roots: Sequence[Path]) -> None:
    """Refuse a `--source-root` that is not a folder.

    Raises:
        ManifestError: Names the root.
    """
    for root in roots:
        if not root.is_dir():
            raise ManifestError(
                f"--source-root {root}: expected a folder with the source videos, found "
                f"{'a file' if root.exists() else 'nothing'}"
            )


def advice(sources: Iterable[str], num_sources: int, roots: Sequence[Path]) -> str:
    """Suggest a fix for missing sources; empty if there are none.

    Args:
        sources: Written paths of the missing sources; repeated ones count once.
        num_sources: Number of sources that the manifests name.
        roots: Folders that were searched too.
    """
    missing = list(dict.fromkeys(sources))
    if not missing:
        return ""
    where = f" nor under {', '.join(map(str, roots))}" if roots else ""
    return (
        f"{len(missing):,} of {num_sources:,} sources are not at the path in the manifest{where} "
        f"(for example {missing[0]}). If they were moved, give the folder that holds them now: "
        "--source-root FOLDER. Otherwise write the manifest again with: wanlora prepare"
    )


def _lost(clips: Sequence[Clip]) -> dict[Path, Parts]:
    """Sources that do not exist, with the parts of their written paths."""
    sources = {clip.path: clip.source for clip in clips}
    return {path: parts_of(text) for path, text in sources.items() if not path.exists()}


def parts_of(written: str) -> Parts:
    r"""Folders and name of a path of any system, without drive, share, root and `..`."""
    is_windows = re.match(r"[A-Za-z]:", written) or "\\" in written
    pure = (PureWindowsPath if is_windows else PurePosixPath)(written)
    return tuple(part for part in pure.parts if part not in (pure.anchor, "..", "."))


def _under(root: Path, lost: Mapping[Path, Parts]) -> dict[Path, Path]:
    """Find sources under a root, all with the same number of leading folders dropped."""
    step = max(1, len(lost) // NUM_TRIED)
    for tried in (list(lost.items())[::step], list(lost.items())):
        depth = max((len(parts) for _, parts in tried), default=0)
        hits = [len(_matches(root, dict(tried), dropped)) for dropped in range(depth)]
        if any(hits):
            return _matches(root, lost, hits.index(max(hits)))
    return {}


def _matches(root: Path, lost: Mapping[Path, Parts], dropped: int) -> dict[Path, Path]:
    """Files under a root at the ends of lost paths, except files that match two paths."""
    found = {
        path: place
        for path, parts in lost.items()
        if len(parts) > dropped
        and os.path.isfile(place := existing_spelling(root.joinpath(*parts[dropped:])))  # noqa: PTH113
    }
    times = Counter(found.values())
    return {path: place for path, place in found.items() if times[place] == 1}


def _at(clip: Clip, path: Path | None) -> Clip:
    if path is None:
        return clip
    if clip.kind == "npz" and not any(clip.bucket):  # a plain line; its size is in the file
        num_frames, height, width = npz.size_or_zeros(path)
        clip = replace(clip, num_frames=num_frames, height=height, width=width)
    return replace(clip, path=path)
