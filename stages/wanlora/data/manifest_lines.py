"""A line of a manifest: from text to a clip with every check, and from a clip to text.

Owns: the fields of a line and their bounds, and the defaults for a line of a plain .npz data set (a
path and a prompt). Must not know: files of lines, how pixels are decoded.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from wanlora.core.buckets import DEFAULT_FPS, MAX_FPS, MAX_FRAMES, MAX_SIDE_PX, MIN_FPS
from wanlora.core.fingerprint import sha256_text
from wanlora.core.text import decode_utf8, shorten, unicode_problem, without_surrogates
from wanlora.data import columns, npz
from wanlora.data.clip import TRAIN, Clip, sample_aspect
from wanlora.data.source_paths import plain_source_path, source_path
from wanlora.errors import ManifestError

KINDS = ("video", "npz", "images")

MAX_LINE_BYTES = 2**20
"""Longest line of a manifest; a caption of 512 tokens has about 3 kB."""
MAX_START_S = 1e6
"""Maximum start, eleven days; a later one is a typing error, and may overflow timestamps."""

_FIELDS: dict[str, tuple[type, ...]] = {
    "clip_id": (str,),
    "source": (str,),
    "source_sha256": (str, type(None)),
    "source_group": (str,),
    "kind": (str,),
    "start_s": (int, float),
    "fps": (int, float),
    "num_frames": (int,),
    "height": (int,),
    "width": (int,),
    "activity": (str,),
    "split": (str,),
    "orig": (dict,),
    "transform": (dict,),
}

_BOUNDS: dict[str, tuple[float, float]] = {
    "start_s": (0, MAX_START_S),
    "fps": (MIN_FPS, MAX_FPS),
    "num_frames": (0, MAX_FRAMES),
    "height": (0, MAX_SIDE_PX),
    "width": (0, MAX_SIDE_PX),
}


def line_of(clip: Clip) -> str:
    """Line of a clip, without the newline."""
    return json.dumps(_record(clip), ensure_ascii=False)


def _record(clip: Clip) -> dict[str, Any]:
    record = {field.name: getattr(clip, field.name) for field in fields(clip)}
    del record["path"]
    record["prompt"] = list(clip.prompts) if len(clip.prompts) > 1 else clip.prompts[0]
    del record["prompts"]
    if clip.weight == 1:
        del record["weight"]
    return record


def parse_line(line: bytes, path: Path, where: str) -> Clip:
    """Read one line.

    Args:
        line: Bytes of the line, UTF-8.
        path: Path of the manifest, for relative paths.
        where: Name of the line in error messages.

    Raises:
        ManifestError: The line cannot be used.
    """
    if len(line) > MAX_LINE_BYTES:
        raise ManifestError(f"{where}: the line has over {MAX_LINE_BYTES:,} bytes")
    try:
        text = decode_utf8(line)
    except ValueError as error:
        raise ManifestError(f"{where}: {error}") from None
    row = columns.json_object(text, where)
    own = "source" in row and "kind" in row
    return _own_clip(row, path, where) if own else _plain_clip(row, path, where)


def _own_clip(row: Mapping[str, Any], manifest: Path, where: str) -> Clip:
    """Read a line that `line_of` wrote; a person may have edited it since."""
    values = {name: _checked(row, name, kinds, where) for name, kinds in _FIELDS.items()}
    if values["kind"] not in KINDS:
        raise ManifestError(
            f"{where}: kind {shorten(values['kind'])}; expected one of {', '.join(KINDS)}"
        )
    for name, (low, high) in _BOUNDS.items():
        if not low <= values[name] <= high:
            raise ManifestError(
                f"{where}: {name} {_shown(values[name])}; expected {low:g} to {high:g}"
            )
    for name in ("clip_id", "source_group", "activity", "split"):
        values[name] = columns.label(values[name], name, where)
    values |= {"start_s": float(values["start_s"]), "fps": float(values["fps"])}
    _require_unicode(values["source_sha256"] or "", "source_sha256", where)
    _require_flat(values["orig"], "orig", where)
    _require_flat(values["transform"], "transform", where)
    _require_aspect(values["transform"], where)
    values["warnings"] = _warnings(row, where)
    source = columns.checked_path(values["source"], where)
    return Clip(
        **values,
        prompts=_captions(row, where),
        path=source_path(source, manifest.parent),
        weight=columns.weight_in(row, f"{where}: clip {values['clip_id']}") or 1.0,
    )


def _checked(row: Mapping[str, Any], name: str, kinds: tuple[type, ...], where: str) -> Any:
    if name not in row:
        raise ManifestError(f"{where}: no {name}; write the manifest again with: wanlora prepare")
    value = row[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ManifestError(f"{where}: {name} is {_shown(value)}; expected {names}")
    return value


def _require_flat(values: Mapping[str, Any], name: str, where: str) -> None:
    """Refuse nested values: they are hashed and compared, and none is ever written."""
    for key, value in values.items():
        _require_unicode(key, f"a key of {name}", where)
        if not isinstance(value, str | int | float | None):
            raise ManifestError(
                f"{where}: {name}.{key:.40} is {_shown(value)}; expected text or a number"
            )
        if isinstance(value, str):
            _require_unicode(value, f"{name}.{key:.40}", where)


def _require_unicode(text: str, name: str, where: str) -> None:
    """Refuse half of a UTF-16 pair: UTF-8 cannot encode it, so the line could not be written."""
    if problem := unicode_problem(text):
        raise ManifestError(f"{where}: {name} {problem}")


def _require_aspect(transform: Mapping[str, Any], where: str) -> None:
    try:
        sample_aspect(transform)
    except ValueError as error:
        raise ManifestError(f"{where}: {error}") from None


def _warnings(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    found = row.get("warnings", [])
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ManifestError(f"{where}: warnings is {_shown(found)}; expected a list of texts")
    return tuple(map(without_surrogates, found))


def _plain_clip(row: Mapping[str, Any], manifest: Path, where: str) -> Clip:
    """Read a line of a plain .npz data set; its size comes from the .npz header.

    A missing or invalid file gives a size of zeros here, and a MediaError when it is loaded. So one
    bad file does not hide the others.
    """
    source = columns.path_in(row, where)
    path = plain_source_path(source, manifest)
    if path.suffix.lower() != ".npz":
        raise ManifestError(
            f"{where}: {source:.200} is not an .npz clip, and the line has no start and size to "
            f"cut it by; make a manifest with: wanlora prepare VIDEOS --captions {manifest}"
        )
    num_frames, height, width = npz.size_or_zeros(path)
    return Clip(
        clip_id=columns.text_in(row, ("clip_id",), where)
        or f"{path.stem}-{sha256_text(source)[:8]}",
        source=source,
        source_sha256=None,
        source_group=columns.text_in(row, columns.GROUP_NAMES, where) or path.stem,
        kind="npz",
        start_s=0.0,
        fps=DEFAULT_FPS,
        num_frames=num_frames,
        height=height,
        width=width,
        prompts=_captions(row, where),
        activity=columns.text_in(row, columns.ACTIVITY_NAMES, where) or path.parent.name,
        split=columns.split_in(row, where) or columns.SPLITS.get(manifest.stem, TRAIN),
        orig={},
        transform={},
        warnings=(),
        path=path,
        weight=columns.weight_in(row, f"{where}: {source}") or 1.0,
    )


def _captions(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    prompts = columns.captions_in(row, where)
    if not prompts:
        raise ManifestError(
            f"{where}: no caption; expected text under one of {', '.join(columns.CAPTION_NAMES)}, "
            f"found {columns.describe(row)}"
        )
    return prompts


def _shown(value: Any) -> str:
    return f"{value!r:.80}"
