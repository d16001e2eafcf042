"""Identity by content: canonical JSON, sha256, and the difference of two provenances.

Owns: the definition of equality for clips, prompts, encoders and configurations.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

SHORT = 16
"""Hex digits of a fingerprint in a path. Each commit record contains the whole fingerprint."""

MISSING = "<absent>"

BLOCK_BYTES = 4 * 2**20
"""Number of bytes of a file that are hashed at a time."""


def canonical_json(value: Any) -> str:
    """Serialize so that equal values give equal text: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_text(text: str) -> str:
    """Hex sha256 of UTF-8 text; halves of UTF-16 pairs are allowed."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def sha256_of(file: IO[bytes], *, alive: Callable[[], None] = lambda: None) -> str:
    """Hex sha256 of the rest of an open file."""
    running = hashlib.sha256()
    while block := file.read(BLOCK_BYTES):
        running.update(block)
        alive()
    return running.hexdigest()


def fingerprint(value: Any) -> str:
    """Hex sha256 of the canonical JSON of a value."""
    return sha256_text(canonical_json(value))


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into one level with dotted names."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat.update(flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Name every field in which two provenances or configurations differ, one line each."""
    a, b = flatten(found), flatten(wanted)
    return [
        f"{key}: found {_short(a.get(key, MISSING))}, wanted {_short(b.get(key, MISSING))}"
        for key in sorted(a.keys() | b.keys())
        if canonical_json(a.get(key, MISSING)) != canonical_json(b.get(key, MISSING))
    ]


def _short(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 4:
        return f"[{', '.join(map(str, value[:3]))}, ... {len(value)} values]"
    text = str(value)
    return text if len(text) <= 80 else f"{text[:16]}..."
