"""One clip of a manifest, and its key. `data.clip_frames` reads its pixels.

Owns: the data of a clip, and the key of its pixels. Must not know: how a clip is written, how
pixels are decoded.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from wanlora.core.aspect import is_hd
from wanlora.core.buckets import Bucket
from wanlora.core.fingerprint import fingerprint

TRANSFORM_REVISION = 1
"""Version of the pixel rules (choice of frames, rotation, resize, crop) in every clip key."""
IMAGE_REVISION = 2
"""Version of the pixel rules for images."""

TRAIN, VAL = "train", "val"
"""Sides of the split."""

_ASPECT = re.compile(r"[0-9]{1,10}(/[0-9]{1,10}|\.[0-9]{1,10})?")
MAX_ASPECT = 100
"""Maximum pixel aspect, and inverse of the minimum; anamorphic video has at most 3."""


@dataclass(frozen=True, slots=True)
class Clip:
    """One line of a manifest: source of a clip, its cut, and its captions.

    Attributes:
        clip_id: Unique name in a manifest, made from the source and the cut, not from the prompt.
        source: Path as written in the line.
        source_sha256: Hash of the source's bytes; None before the first read.
        kind: A video to cut, a clip already cut (npz), or a still image (images).
        source_group: Group of dependent clips; all clips of a group are in the same split.
        start_s: Seconds from the source's first frame to the clip's.
        fps: Frames per second of the clip.
        prompts: Captions; the first is the prompt.
        orig: Size, fps and duration of the source, for people to read.
        transform: Conversion of frames to the clip's pixels; part of the clip's key.
        path: Absolute path of the source; not written.
        weight: Relative frequency of the clip in training; written only if it is not 1.
    """

    clip_id: str
    source: str
    source_sha256: str | None
    source_group: str
    kind: Literal["video", "npz", "images"]
    start_s: float
    fps: float
    num_frames: int
    height: int
    width: int
    prompts: tuple[str, ...]
    activity: str
    split: str
    orig: dict[str, Any]
    transform: dict[str, Any]
    warnings: tuple[str, ...]
    path: Path
    weight: float = 1.0

    @property
    def prompt(self) -> str:
        """The first caption."""
        return self.prompts[0]

    @property
    def bucket(self) -> Bucket:
        """Size of the clip; zeros for a plain .npz line whose file could not be read."""
        return Bucket(self.num_frames, self.height, self.width)


def clip_key(clip: Clip, source_sha256: str) -> str:
    """Hex sha256 of everything that decides the pixels of a clip.

    Captions and labels are not hashed. The fps is hashed for .npz clips and images too, although
    their pixels do not depend on it, so `prepare` with another `--fps` encodes them again as well.

    Args:
        clip: Clip with the cut.
        source_sha256: Hash of the source's bytes as they are now.
    """
    return fingerprint(
        {
            "source": source_sha256,
            "kind": clip.kind,
            "start_s": clip.start_s,
            "fps": clip.fps,
            "size": list(clip.bucket),
            "transform": clip.transform,
            "revision": IMAGE_REVISION if clip.kind == "images" else TRANSFORM_REVISION,
        }
    )


def sample_aspect(transform: Mapping[str, Any]) -> Fraction:
    """Width over height of one pixel of the source, upright.

    Raises:
        ValueError: It is not a number or ratio such as `128/117`, or is out of range.
    """
    value = transform.get("sample_aspect", "1")
    return _aspect(value if isinstance(value, str) else f"{value!r:.80}")


@lru_cache(maxsize=1024)
def _aspect(text: str) -> Fraction:
    if not _ASPECT.fullmatch(text) or re.search(r"/0+$", text):
        raise ValueError(f'sample_aspect {text!r:.80}; expected a text such as "1" or "128/117"')
    aspect = Fraction(text)
    if not Fraction(1, MAX_ASPECT) <= aspect <= MAX_ASPECT:
        raise ValueError(f"sample_aspect {text}; expected 1/{MAX_ASPECT} to {MAX_ASPECT}")
    return aspect


def has_hd_size(clip: Clip) -> bool:
    """Return whether the coded frames have HD size; the size in `orig` is upright."""
    height, width = clip.orig.get("height"), clip.orig.get("width")
    if not (isinstance(height, int) and isinstance(width, int)):
        return False
    return is_hd(width, height) if clip.orig.get("rotation") in (90, 270) else is_hd(height, width)
