"""Tables of captions: JSONL, JSON, CSV, and two lists side by side.

Owns: turning a file into rows. What a column may be called stands in `core.rows`.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from wanlora.core import rows
from wanlora.errors import ManifestError

NAMES = (
    "metadata.jsonl", "metadata.csv", "metadata.json", "captions.json", "captions.jsonl",
    "captions.csv", "videos2caption.json", "dataset.jsonl", "dataset.json", "dataset.csv",
)  # fmt: skip
"""Tables that are read without being asked for: Hugging Face, DiffSynth, diffusion-pipe, FastVideo,
finetrainers."""

PATH_LISTS = ("videos.txt", "video.txt", "images.txt", "image.txt")
CAPTION_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
"""finetrainers' and CogVideoX' two files: line k of one is about line k of the other."""

Rows = Iterator[tuple[str, Mapping[str, Any]]]


def in_folder(folder: Path) -> list[Path]:
    """Every table of a folder; a list of paths stands for itself and the captions beside it."""
    found = [folder / name for name in NAMES if (folder / name).is_file()]
    if _caption_list(folder) is not None:
        found += [folder / name for name in PATH_LISTS if (folder / name).is_file()]
    return found


def read(path: Path) -> Rows:
    """Yield (`file:line`, row) of a JSONL, JSON or CSV file, or of a list of paths.

    Raises:
        ManifestError: The file is missing or is not what its suffix says.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ManifestError(f"no captions file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"captions file {path} cannot be read: {error}") from None
    if path.name in PATH_LISTS:
        return _read_lists(path, text)
    readers: dict[str, Callable[[Path, str], Rows]] = {
        ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv,
    }  # fmt: skip
    if path.suffix.lower() not in readers:
        raise ManifestError(
            f"captions file {path}: expected .jsonl, .json or .csv, "
            f"or one of {', '.join(PATH_LISTS)} beside one of {', '.join(CAPTION_LISTS)}"
        )
    return readers[path.suffix.lower()](path, text)


def _read_jsonl(path: Path, text: str) -> Rows:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", rows.json_object(line, f"{path}:{number}")


def _read_json(path: Path, text: str) -> Rows:
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


def _read_csv(path: Path, text: str) -> Rows:
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


def _read_lists(path: Path, text: str) -> Rows:
    captions = _caption_list(path.parent)
    if captions is None:
        raise ManifestError(f"{path}: no {' or '.join(CAPTION_LISTS)} beside it")
    names = text.rstrip("\n").split("\n")
    texts = captions.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    if len(names) != len(texts):
        raise ManifestError(
            f"{path} has {len(names)} lines and {captions.name} has {len(texts)}; line k of one is "
            "about line k of the other, so their numbers must be equal"
        )
    for number, (name, caption) in enumerate(zip(names, texts, strict=True), start=1):
        if name.strip():
            yield f"{path}:{number}", {"path": name.strip(), "caption": caption}


def _caption_list(folder: Path) -> Path | None:
    return next((folder / n for n in CAPTION_LISTS if (folder / n).is_file()), None)
