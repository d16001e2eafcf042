"""What the columns of a caption file or manifest may be called.

Owns: the names under which a path, captions, an activity, a source group and a weight are found in
one row, and the range of weights.
Knows nothing of files; `where` is how an error names the row, for example `train.jsonl:3`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from wanlora.errors import ManifestError

PATH_NAMES = (
    "video", "video_path", "video_file", "file_name", "path", "file", "clip", "npz", "frames_path",
    "image", "image_path",
)  # fmt: skip
CAPTION_NAMES = ("prompt", "caption", "text", "cap")
ACTIVITY_NAMES = ("activity", "label", "class")
GROUP_NAMES = ("source_group", "group")
SPLIT_NAMES = ("split",)
WEIGHT_NAMES = ("weight", "num_repeats", "repeats")
MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0
"""Range of a clip's weight: wide enough for any mix, and an epoch keeps a sane length."""
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
          "test": "val"}  # fmt: skip


def json_object(line: str, where: str) -> dict[str, Any]:
    """Parse one line of JSON lines.

    Raises:
        ManifestError: It is not one JSON object.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ManifestError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ManifestError(f"{where}: expected an object with a path and a caption, found {row!r}")
    return row


def path_in(row: Mapping[str, Any], where: str) -> str:
    """The path a row is about.

    Raises:
        ManifestError: There is none, or two names of the path hold different ones.
    """
    value = _value(row, PATH_NAMES, where)
    if value is None:
        raise ManifestError(
            f"{where}: no path; expected one of {', '.join(PATH_NAMES)}, found {_found(row)}"
        )
    return _text(value, "path", where)


def captions_in(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The captions of a row, without the empty ones; a list means several captions.

    Raises:
        ManifestError: Two names of the caption hold different ones, or a caption is not text.
    """
    value = _value(row, CAPTION_NAMES, where)
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(text for item in values if (text := _text(item, "caption", where).strip()))


def text_in(row: Mapping[str, Any], names: Sequence[str], where: str) -> str | None:
    """An optional text or number under one of several names, as text."""
    value = _value(row, names, where)
    return str(value) if isinstance(value, int | float | str) else None


def split_in(row: Mapping[str, Any], where: str) -> str | None:
    """The side of the split that a person chose: train or val, or None.

    Raises:
        ManifestError: It is another word.
    """
    value = text_in(row, SPLIT_NAMES, where)
    if value is None:
        return None
    if value.strip().lower() not in SPLITS:
        raise ManifestError(f"{where}: split {value!r}; expected one of {', '.join(SPLITS)}")
    return SPLITS[value.strip().lower()]


def weight_in(row: Mapping[str, Any], where: str) -> float | None:
    """Weight of a row, given as a number or (in CSV) as text; None without one.

    Raises:
        ManifestError: It is not a number in the range.
    """
    value = _value(row, WEIGHT_NAMES, where)
    if value is None:
        return None
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if problem := weight_problem(weight):
        raise ManifestError(f"{where}: weight {value!r:.40}; {problem}")
    return weight


def weight_problem(weight: float) -> str | None:
    """Expected range when a weight is outside it, else None."""
    if MIN_WEIGHT <= weight <= MAX_WEIGHT:
        return None
    return (
        f"expected a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g} (to leave a clip out, remove "
        "its line)"
    )


def _value(row: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    present = {name: row[name] for name in names if row.get(name) not in (None, "", [])}
    first = next(iter(present), None)
    if first is None:
        return None
    for name, value in present.items():
        if value != present[first]:
            raise ManifestError(
                f"{where}: {first} and {name} mean the same and disagree: "
                f"{present[first]!r} against {value!r}; keep one of them"
            )
    return present[first]


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise ManifestError(f"{where}: the {what} is {value!r}; expected text")
    return value


def _found(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "an empty row"
