"""Rows of all tables, by source.

Owns: the choice of tables, and the rows that are bad or name no source. Must not know: sidecars,
the sources that are used.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanlora.data import columns
from wanlora.data.captions import tables
from wanlora.data.captions.folders import Failure, absolute
from wanlora.data.captions.lookup import Lookup
from wanlora.data.captions.notes import Notes, add_row
from wanlora.errors import ManifestError


@dataclass(slots=True)
class Collected:
    """Content of tables.

    Attributes:
        notes: Notes by source.
        failures: Bad rows, and rows about missing files.
        elsewhere: Number of rows about files outside the sources given.
        unmatched: Rows whose source was not found: place of the row, written path, expected path.
    """

    notes: dict[Path, Notes] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    elsewhere: int = 0
    unmatched: list[tuple[str, str, Path]] = field(default_factory=list)


def tables_beside(given: Sequence[Path], paths: Sequence[Path], sidecars: set[Path]) -> list[Path]:
    """List the tables in the folders given, in those below, and beside single files."""
    inner = {path.parent for path in paths}
    folders = set(inner)
    for path in map(absolute, given):
        if path.is_dir():
            folders.add(path)
            folders |= {f for folder in inner for f in folder.parents if f.is_relative_to(path)}
    return sorted(table for folder in folders for table in tables.in_folder(folder, sidecars))


def tables_above(given: Sequence[Path], sidecars: set[Path]) -> list[Path]:
    """List the tables one level above the folders given."""
    above = {path.parent for path in map(absolute, given) if path.is_dir()}
    return sorted(table for folder in above for table in tables.in_folder(folder, sidecars))


def collect(
    found_tables: Sequence[Path],
    given: Sequence[Path],
    paths: Sequence[Path],
    sidecars: set[Path],
    *,
    anywhere: bool,
) -> Collected:
    """Gather the rows of tables by source.

    Args:
        found_tables: The tables.
        given: Folders or files given on the command line.
        paths: Paths of the sources.
        sidecars: Captions of single videos.
        anywhere: True if a path may be relative to a given folder. A table found beside videos is
            only about these: in other folders, a file of the same name may be a different one.

    Raises:
        ManifestError: A table cannot be read.
    """
    collected = Collected()
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
    collected: Collected,
    lookup: Lookup,
    *,
    has_folders: bool,
) -> None:
    name = columns.path_in(row, where)
    path, candidates = lookup(name, table, where)
    if path is not None:
        add_row(collected.notes.setdefault(path, Notes()), row, where, table=table)
        return
    collected.unmatched.append((where, name, candidates[0]))
    # Path.is_file raises for a path that the system refuses; this is False for it.
    if any(map(os.path.isfile, candidates)) or not has_folders:
        collected.elsewhere += 1
    else:
        message = f"{where}: there is no file {candidates[0]}"
        collected.failures[str(candidates[0])] = Failure("missing", message, str(candidates[0]))
