"""Clips of a manifest, made without any source file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wanlora.data import manifest
from wanlora.data.clip import Clip


def clip(clip_id: str = "walk-00000000-000000", **changes: Any) -> Clip:
    values: dict[str, Any] = {
        "clip_id": clip_id,
        "source": "../raw/walk.mp4",
        "source_sha256": "ab" * 32,
        "source_group": "walk",
        "kind": "video",
        "start_s": 0.0,
        "fps": 16.0,
        "num_frames": 17,
        "height": 32,
        "width": 48,
        "prompts": ("a person walks",),
        "activity": "walking",
        "split": "train",
        "orig": {"fps": 25.0},
        "transform": {"resize": "bicubic-antialias", "crop": "center", "sample_aspect": "1"},
        "warnings": (),
        "path": Path("/data/raw/walk.mp4"),
    }
    return Clip(**(values | changes))


def write_manifest(path: Path, clips: Sequence[Clip]) -> None:
    path.write_bytes(manifest.document(clips))
