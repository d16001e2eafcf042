"""Captions and columns of one source.

Owns: the union of the rows and .txt sidecars of one source, and their contradictions.
Must not know: which row is about which source (`lookup`), how tables are read (`tables`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanlora.core.shares import weight_problem
from wanlora.core.text import decode_utf8, shorten
from wanlora.data import columns
from wanlora.errors import ManifestError
from wanlora.files import existing_spelling


@dataclass(slots=True)
class Notes:
    """Captions and columns about one source.

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
        """Weight of the source."""
        return max((self.weights[key] for key in self.weighted or self.weights), default=1.0)


def add_row(note: Notes, row: Mapping[str, Any], where: str, *, table: Path) -> None:
    """Add a row of a table.

    Raises:
        ManifestError: A value of the row is invalid; nothing of the row is added.
    """
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
    note: Notes, name: str, before: str | None, value: str | None, where: str
) -> str | None:
    """Return the value that rows of one file agree on; a contradiction is a problem of the file."""
    if before is not None and value is not None and value != before:
        note.problem = (
            f"{where}: {name} {shorten(value)} disagrees with {shorten(before)} in another row of "
            "this file"
        )
    return before if value is None else value


def read_sidecars(paths: Iterable[Path], notes: dict[Path, Notes]) -> dict[Path, str]:
    """Add the captions of .txt files, and return the errors of those that cannot be read."""
    problems: dict[Path, str] = {}
    for path in paths:
        try:
            text = sidecar_text(path)
        except (OSError, ValueError) as error:
            problems[path] = f"{path.with_suffix('.txt').name} cannot be read: {error}"
            continue
        if text is None:
            continue
        note = notes.setdefault(path, Notes())
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
