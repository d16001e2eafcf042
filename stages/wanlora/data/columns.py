"""Names and values of the columns of a caption file or manifest.

Owns: the names under which a path, captions, an activity, a source group and a weight are found in
one row, and the checks of their values. Must not know: files. `where` is the row's name in error
messages, for example `train.jsonl:3`.
"""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from wanlora.core.prompts import clean_prompt
from wanlora.core.shares import weight_problem
from wanlora.core.text import MAX_LABEL, parse_json, path_problem, shorten, without_surrogates
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
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
          "test": "val"}  # fmt: skip

_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zs", "Zl", "Zp"})


def json_object(line: str, where: str) -> dict[str, Any]:
    """Parse one line of JSON lines.

    Raises:
        ManifestError: It is not one JSON object, or holds a number that is not finite.
    """
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ManifestError(f"{where}: not JSON: {error!s:.200}") from None
    if not isinstance(row, dict):
        raise ManifestError(
            f"{where}: expected an object with a path and a caption, found {_shown(row)}"
        )
    return row


def path_in(row: Mapping[str, Any], where: str) -> str:
    """Path of a row.

    Raises:
        ManifestError: There is none, it cannot be a path, or two names of the path hold different
            ones.
    """
    value = _value(row, PATH_NAMES, where)
    if value is None:
        raise ManifestError(
            f"{where}: no path; expected one of {', '.join(PATH_NAMES)}, found {describe(row)}"
        )
    return checked_path(_text(value, "path", where), where)


def checked_path(text: str, where: str) -> str:
    """Return a path unchanged.

    Raises:
        ManifestError: It is empty, too long, or has characters that a path cannot have.
    """
    if problem := path_problem(text):
        raise ManifestError(f"{where}: {problem}")
    return text


def captions_in(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Captions of a row, without the empty ones; a list means several captions.

    Raises:
        ManifestError: Two names of the caption hold different ones, or a caption is not text.
    """
    value = _value(row, CAPTION_NAMES, where)
    values = value if isinstance(value, list) else [] if value is None else [value]
    texts = (without_surrogates(_text(item, "caption", where)).strip() for item in values)
    return tuple(text for text in texts if is_caption(text))


def is_caption(text: str) -> bool:
    """Return whether a stripped text has a visible character after cleaning; `&nbsp;` has none.

    A letter or digit at the start stays, so most captions need no cleaning here.
    """
    if not text or (text[0].isascii() and text[0].isalnum()):
        return bool(text)
    return any(unicodedata.category(char) not in _INVISIBLE for char in clean_prompt(text))


def text_in(row: Mapping[str, Any], names: Sequence[str], where: str) -> str | None:
    """Return an optional text or number under one of several names, as text.

    Raises:
        ManifestError: Two of the names hold different ones, or the text is too long.
    """
    value = _value(row, names, where)
    return label(str(value), names[0], where) if isinstance(value, int | float | str) else None


def label(text: str, name: str, where: str) -> str:
    """Return a name of a clip, group or activity, with halves of characters replaced.

    Raises:
        ManifestError: It is too long.
    """
    if len(text) > MAX_LABEL:
        raise ManifestError(
            f"{where}: {name} has {len(text):,} characters; expected at most {MAX_LABEL:,}"
        )
    return without_surrogates(text)


def split_in(row: Mapping[str, Any], where: str) -> str | None:
    """Split in the row: train or val, or None if there is no such column.

    Raises:
        ManifestError: It is another word.
    """
    value = text_in(row, SPLIT_NAMES, where)
    if value is None:
        return None
    if value.strip().lower() not in SPLITS:
        raise ManifestError(f"{where}: split {shorten(value)}; expected one of {', '.join(SPLITS)}")
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
        raise ManifestError(f"{where}: weight {_shown(value)}; {problem}")
    return weight


def describe(row: Mapping[str, Any]) -> str:
    """Names of a row's columns, for a message."""
    return without_surrogates(f"{', '.join(map(str, row)):.200}") or "an empty row"


def _value(row: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    present = {name: row[name] for name in names if row.get(name) not in (None, "", [])}
    first = next(iter(present), None)
    if first is None:
        return None
    for name, value in present.items():
        if value != present[first]:
            raise ManifestError(
                f"{where}: {first} and {name} mean the same and disagree: "
                f"{_shown(present[first])} against {_shown(value)}; keep one of them"
            )
    return present[first]


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise ManifestError(f"{where}: the {what} is {_shown(value)}; expected text")
    return value


def _shown(value: Any) -> str:
    return shorten(value) if isinstance(value, str) else f"{value!r:.80}"
