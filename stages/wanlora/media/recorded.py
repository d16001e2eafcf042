"""A video and, beside it, a JSON record of its settings.

Owns: the order in which they are written, and the file formats of videos. A video never exists
without a record or beside the record of another video.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from wanlora.core.text import without_surrogates
from wanlora.files import partial_path, write_atomic, write_text, writing
from wanlora.media import mp4
from wanlora.report.gif import gif


def write(path: Path, frames: UInt8[np.ndarray, "t h w 3"], *, record: Mapping[str, Any]) -> None:
    """Write a video in the format of its suffix, and its record beside it.

    Args:
        path: Path that ends in one of `FORMATS`; an existing file is replaced.
        frames: RGB frames with even height and width.
        record: Settings of the video, at least `prompt` and `fps`. Also stored in the video file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(path)
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_text(record_path(path), text)
    metadata = {"title": without_surrogates(str(record["prompt"])), "comment": json.dumps(record)}
    FORMATS[path.suffix](path, frames, fps=float(record["fps"]), metadata=metadata)


def record_path(path: Path) -> Path:
    """The JSON beside a video."""
    return path.with_suffix(".json")


def read_record(path: Path) -> dict[str, Any] | None:
    """Read the record of a video; None if either file is missing or the record is damaged."""
    return record_beside(path) if path.exists() else None


def record_beside(path: Path) -> dict[str, Any] | None:
    """Record of a video, which itself may be missing after a kill; None for any other JSON."""
    try:
        record = json.loads(record_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def remove(path: Path) -> None:
    """Remove a video, before its record changes."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _write_frames(
    path: Path,
    frames: UInt8[np.ndarray, "t h w 3"],
    *,
    fps: float,
    metadata: Mapping[str, str],
) -> None:
    """Write a folder of PNGs, one per frame, without any change of pixels."""
    about = PngInfo()
    for key, value in {**metadata, "fps": str(fps)}.items():
        about.add_itxt(key, value)
    temporary = partial_path(path)
    try:
        with writing(path):
            temporary.mkdir()
            for number, pixels in enumerate(frames):
                Image.fromarray(np.ascontiguousarray(pixels)).save(
                    temporary / f"{number:04d}.png", pnginfo=about
                )
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_gif(
    path: Path,
    frames: UInt8[np.ndarray, "t h w 3"],
    *,
    fps: float,
    metadata: Mapping[str, str],
) -> None:
    """Write a GIF that repeats, with 256 colours per frame."""
    write_atomic(path, gif(frames, fps=fps, comment=metadata["comment"]))


FORMATS: dict[str, Callable[..., None]] = {
    ".mp4": mp4.write,
    ".webm": partial(mp4.write, codec=mp4.VP9),
    ".gif": _write_gif,
    ".frames": _write_frames,
}
