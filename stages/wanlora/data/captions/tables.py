"""Tables of captions: JSONL, JSON, CSV, and two lists side by side.

Owns: turning a file into rows; a row that cannot be read is reported in its place. The names of
columns are in `data.columns`.
"""

import csv
import io
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from wanlora.core.text import decode_utf8, parse_json
from wanlora.data import columns
from wanlora.errors import ManifestError

NAMES = (
    "metadata.jsonl", "metadata.csv", "metadata.json", "captions.json", "captions.jsonl",
    "captions.csv", "videos2caption.json", "dataset.jsonl", "dataset.json", "dataset.csv",
)  # fmt: skip
"""Tables that are read by default: Hugging Face, DiffSynth, diffusion-pipe, FastVideo,
finetrainers."""

PATH_LISTS = ("videos.txt", "video.txt", "images.txt", "image.txt")
CAPTION_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
"""The two files of finetrainers and CogVideoX; line k of one belongs to line k of the other."""

DELIMITERS = (",", ";", "\t")
"""Delimiters of CSV files. Spreadsheets use semicolons if the locale's decimal point is a comma."""

Rows = Iterator[tuple[str, Mapping[str, Any] | ManifestError]]
"""`file:line`, and the row or the reason why it cannot be read."""


def in_folder(folder: Path, sidecars: Collection[Path] = ()) -> list[Path]:
    """List the tables of a folder; a list of paths counts if a list of captions is beside it.

    Args:
        folder: The folder.
        sidecars: Captions of single videos: `video.txt` beside `video.mp4` is not a list.
    """
    found = [folder / name for name in NAMES if (folder / name).is_file()]
    lists = [folder / name for name in PATH_LISTS if (folder / name).is_file()]
    lists = [path for path in lists if path not in sidecars]
    if lists and _caption_list(folder, sidecars) is not None:
        found += lists
    return found


def read(path: Path, sidecars: Collection[Path] = ()) -> Rows:
    """Yield (`file:line`, row) of a JSONL, JSON or CSV file, or of a list of paths.

    Args:
        path: The file.
        sidecars: Captions of single videos, which are not lists.

    Raises:
        ManifestError: The file is missing, is not text, or its suffix does not fit its content.
    """
    text = _text(path)
    if path.name in PATH_LISTS:
        return _read_lists(path, text, sidecars)
    readers: dict[str, Callable[[Path, str], Rows]] = {
        ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv,
    }  # fmt: skip
    if path.suffix.lower() not in readers:
        raise ManifestError(
            f"captions file {path}: expected .jsonl, .json, .csv or .tsv, "
            f"or one of {', '.join(PATH_LISTS)} beside one of {', '.join(CAPTION_LISTS)}"
        )
    return readers[path.suffix.lower()](path, text)


def _text(path: Path) -> str:
    try:
        return decode_utf8(path.read_bytes())
    except FileNotFoundError:
        raise ManifestError(f"no captions file at {path}") from None
    except (OSError, ValueError) as error:
        raise ManifestError(f"captions file {path} cannot be read: {error}") from None


def _read_jsonl(path: Path, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield where, columns.json_object(line, where)
            except ManifestError as error:
                yield where, error


def _read_json(path: Path, text: str) -> Rows:
    """Read a list of rows, or an object from path to caption(s) or row."""
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ManifestError(f"{path} is not JSON: {error!s:.200}") from None
    if isinstance(content, dict):
        content = [
            {"path": key, **(value if isinstance(value, dict) else {"caption": value})}
            for key, value in content.items()
        ]
    if not isinstance(content, list):
        raise ManifestError(f"{path}: expected a list of rows or an object, found {content!r:.60}")
    for number, row in enumerate(content, start=1):
        where = f"{path}: row {number}"
        if isinstance(row, dict):
            yield where, row
        else:
            yield where, ManifestError(f"{where} is {row!r:.60}; expected an object")


def _read_csv(path: Path, text: str) -> Rows:
    head = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=head.count)  # the first one if there are as many of others
    reader = csv.DictReader(
        io.StringIO(text), strict=True, delimiter=delimiter, skipinitialspace=True
    )
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None not in row:
                yield where, row
                continue
            yield (
                where,
                ManifestError(
                    f"{where}: more fields than the header has; quote captions that hold separators"
                ),
            )
    except csv.Error as error:
        raise ManifestError(f"{path}:{reader.line_num}: not CSV: {error}") from None


def _read_lists(path: Path, text: str, sidecars: Collection[Path]) -> Rows:
    captions = _caption_list(path.parent, sidecars)
    if captions is None:
        raise ManifestError(f"{path}: no {' or '.join(CAPTION_LISTS)} beside it")
    names = text.rstrip("\n").split("\n")
    texts = _text(captions).rstrip("\n").split("\n")
    if len(names) != len(texts):
        raise ManifestError(
            f"{path} has {len(names)} lines and {captions.name} has {len(texts)}; line k of one is "
            "about line k of the other, so their numbers must be equal"
        )
    for number, (name, caption) in enumerate(zip(names, texts, strict=True), start=1):
        if name.strip():
            yield f"{path}:{number}", {"path": name.strip(), "caption": caption}


def _caption_list(folder: Path, sidecars: Collection[Path]) -> Path | None:
    lists = (folder / name for name in CAPTION_LISTS)
    return next((path for path in lists if path not in sidecars and path.is_file()), None)
