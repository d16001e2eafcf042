"""Find the sources of a table's paths: the folder they are relative to, and their spelling.

Owns: the order in which folders are tried. Reads no file.
"""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from wanlora.core.text import shorten, spellings
from wanlora.data.captions.folders import absolute
from wanlora.errors import ManifestError


class Lookup:
    """Lookup of the source that a path in a table names.

    Args:
        paths: Paths of the sources.
        folders: Folders that a path may be relative to, besides the table's own.
    """

    def __init__(self, paths: Sequence[Path], folders: Sequence[Path]) -> None:
        self._paths = set(paths)
        self._folders = folders
        self._composed = {_composed(path): path for path in paths if not str(path).isascii()}

    def __call__(self, name: str, table: Path, where: str) -> tuple[Path | None, list[Path]]:
        """Return the source, if there is one, and the paths tried.

        Raises:
            ManifestError: The path matches several sources.
        """
        if (usual := absolute(table.parent / name)) in self._paths:
            return usual, [usual]
        names = spellings(name)
        # FastVideo's rows leave out the folder `videos`.
        beside = [absolute(b / n) for b in (table.parent, table.parent / "videos") for n in names]
        # `train/a.mp4` in train/metadata.csv: from a folder above, but inside the table's own.
        inside = absolute(table.parent)
        above = [absolute(base / n) for base in inside.parents for n in names]
        beside += [path for path in above if path.is_relative_to(inside)]
        for candidate in beside:
            if (path := self._source(candidate)) is not None:
                return path, beside
        others = [absolute(base / n) for base in self._folders for n in names]
        matches = {path for c in others if (path := self._source(c)) is not None}
        if len(matches) > 1:
            raise ManifestError(
                f"{where}: {shorten(name)} may be any of {', '.join(map(str, sorted(matches)))}; "
                "write more of the path"
            )
        return next(iter(matches), None), [*beside, *others]

    def _source(self, candidate: Path) -> Path | None:
        if candidate in self._paths:
            return candidate
        return self._composed.get(_composed(candidate)) if self._composed else None


def _composed(path: Path) -> str:
    return unicodedata.normalize("NFC", str(path))
