"""Text from outside: bytes to characters, JSON to values, and file names as people spell them.

Owns: the checks that every caption, path and line of JSON passes when it is read. Must not know:
manifests, tables, the source of a text.
"""

import codecs
import hashlib
import json
import math
import re
import unicodedata
from typing import Any

MAX_PATH_BYTES = 4096
"""PATH_MAX of Linux, terminator included."""
MAX_NAME_BYTES = 255
"""NAME_MAX of ext4, XFS, APFS and NTFS: the longest part of a path."""
_STEM_BYTES = 160
"""Maximum length of a part of a name; leaves room for a size, a hash and a suffix."""
MAX_LABEL = 1000
"""Maximum number of characters in the name of a clip, an activity or a source group."""

LFS_HEAD = b"version https://git-lfs.github.com/spec/"
"""Start of the small file that Git LFS leaves in place of one that it has not fetched."""
LFS_REMEDY = "is a Git LFS pointer, not the file itself; fetch it with: git lfs pull"

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def decode_utf8(data: bytes) -> str:
    """Decode UTF-8 text, with or without a byte order mark.

    Raises:
        ValueError: The bytes are in another encoding (the message has the likely one), or a Git
            LFS pointer.
    """
    if data.startswith(LFS_HEAD):
        raise ValueError(f"it {LFS_REMEDY}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        likely = _likely_encoding(data)
        raise ValueError(
            f"not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}; {likely}): save the "
            "file as UTF-8"
        ) from None


def _likely_encoding(data: bytes) -> str:
    for mark, name in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return f"it is {name}"
    if b"\0" in data:
        return "it is UTF-16, or not text"
    return "probably Windows-1252"


def without_surrogates(text: str) -> str:
    r"""Replace halves of UTF-16 pairs by U+FFFD, and join pairs; UTF-8 has no bytes for a half.

    JSON may hold one half of an emoji (`"\ud83d"`). ftfy, and so WanPipeline, replaces it by the
    same character, so the embedding of the caption does not change.
    """
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def unicode_problem(text: str) -> str | None:
    r"""Describe half of a UTF-16 pair (`"\ud83d"` in JSON) in a text, or return None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        return (
            f"is {text!a:.80}, which is not valid Unicode: character {error.start + 1} is "
            f"U+{code:04X}, half of a UTF-16 pair"
        )
    return None


def parse_json(text: str) -> Any:
    """Parse JSON strictly: Python's parser also accepts NaN, Infinity and 1e999.

    Raises:
        ValueError: The text is not JSON, holds a number that is not finite or has over 4,300
            digits, or is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.40} is out of range")
    return value


def path_problem(text: str) -> str | None:
    """Describe what is wrong with a path as text, or None; the disk is not read."""
    if not text.strip():
        return "the path is empty"
    if "\0" in text:
        return "the path holds a NUL character"
    try:
        data = text.encode()
    except UnicodeEncodeError:
        return f"the path {text!a:.80} is not valid Unicode; rename the file"
    if len(data) >= MAX_PATH_BYTES or any(len(p) > MAX_NAME_BYTES for p in data.split(b"/")):
        return (
            f"the path has {len(text):,} characters; expected under {MAX_PATH_BYTES:,} bytes, and "
            f"at most {MAX_NAME_BYTES} for each part: {text:.40}..."
        )
    return None


def file_stem(text: str) -> str:
    """Turn an id from user data into a part of a file name: never a path, hidden or too long.

    Letters, digits, `.`, `_` and `-` stay. If anything changes, a hash of the text is added, so
    that different ids keep different names.
    """
    data = re.sub(r"[^\w.-]+", "-", text).strip(".-").encode(errors="ignore")
    safe = data[:_STEM_BYTES].decode(errors="ignore")
    if safe == text:
        return safe
    digest = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:8]
    return f"{safe}-{digest}" if safe else digest


def spellings(name: str) -> list[str]:
    r"""List the ways to write a path that people take for the same one, the given one first.

    `videos\a.mp4` was written on Windows. macOS may decompose accents in file names (NFD), and
    editors write them composed (NFC).
    """
    slashed = name.replace("\\", "/")
    forms = [name, slashed]
    if not name.isascii():
        forms += [
            unicodedata.normalize(form, n) for form in ("NFC", "NFD") for n in (name, slashed)
        ]
    return list(dict.fromkeys(forms))


def shorten(text: str, most: int = 80) -> str:
    """Quote a text for a terminal; a long one is cut, with its length."""
    if len(text) <= most:
        return repr(text)
    return f"{text[:most]!r}... ({len(text):,} characters)"
