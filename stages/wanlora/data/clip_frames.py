"""Frames of a clip, as the VAE receives them.

Owns: `load_clip`, the only function that makes pixels, and the PyTorch data set over it. Stage one
and `verify` use it; stage two does not. Must not know: lines of manifests, models.
Dimensions: b clips, t frames, c = 3 channels, h height, w width in px.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch.utils.data import Dataset

from wanlora.core.aspect import cover_problem
from wanlora.core.buckets import problem_with
from wanlora.data import manifest, npz
from wanlora.data.clip import Clip, sample_aspect
from wanlora.errors import ManifestError, MediaError, PassingError
from wanlora.media import image
from wanlora.media.source import (
    SourceHashes,
    reading,
    source_sha256,
    unchanged,
)
from wanlora.media.timeline import COARSE
from wanlora.media.transform import resize_and_crop


class Item(TypedDict):
    """One clip of a `ClipDataset`."""

    frames: torch.Tensor
    prompt: str
    clip_id: str
    activity: str


class Batch(TypedDict):
    """Several clips of one size."""

    frames: torch.Tensor
    prompts: list[str]
    clip_ids: list[str]
    activities: list[str]


def load_clip(clip: Clip, *, num_frames: int | None = None) -> UInt8[torch.Tensor, "t 3 h w"]:
    """Load a clip exactly as the VAE will see it, before `to_signed`.

    Args:
        clip: The clip.
        num_frames: Load only this many frames from the start; None loads all.

    Raises:
        MediaError: The source cannot be used or does not match the manifest. Replaces every error
            of a library, except out-of-memory errors.
    """
    with reading(clip.path):
        if clip.kind == "npz":
            return _from_npz(npz.read(clip.path), clip)[:num_frames]
        return _load(clip, num_frames or clip.num_frames)


def load_unchanged(
    clip: Clip, known: SourceHashes, *, num_frames: int | None = None
) -> UInt8[torch.Tensor, "t 3 h w"]:
    """Load a clip, and check that its pixels come from the bytes of its `source_sha256`.

    For a video, compares the stamp before and after decoding, and the hash if the stamp has
    changed. For an .npz, hashes the bytes that are decoded.

    Args:
        clip: The clip; if its `source_sha256` is None, only changes during loading are refused.
        known: Hashes of sources; new ones are added.
        num_frames: As for `load_clip`.

    Raises:
        MediaError: As `load_clip`; changed if the source has changed or changes during loading.
    """
    digest: str | None = None
    with unchanged(clip.path):
        if clip.kind == "npz" and clip.source_sha256 is not None:
            with reading(clip.path):
                frames, digest = npz.read_hashed(clip.path)
                pixels = _from_npz(frames, clip)[:num_frames]
        else:
            pixels = load_clip(clip, num_frames=num_frames)
            if clip.source_sha256 is not None:
                digest = source_sha256(clip.path, known)
    if digest != clip.source_sha256:
        raise PassingError(
            "changed",
            f"{clip.path} was replaced after it was hashed (sha256 {digest!s:.12}, expected "
            f"{clip.source_sha256:.12}); run the same command again",
        )
    return pixels


def _from_npz(frames: UInt8[np.ndarray, "t h w 3"], clip: Clip) -> UInt8[torch.Tensor, "t 3 h w"]:
    if frames.shape[:3] != tuple(clip.bucket):
        found = "x".join(map(str, frames.shape[:3]))
        raise MediaError("bad_size", f"{clip.path}: expected {clip.bucket}, found {found}")
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()


def _load(clip: Clip, num_frames: int) -> UInt8[torch.Tensor, "t 3 h w"]:
    if problem := problem_with(clip.bucket):
        raise MediaError("bad_size", f"clip {clip.clip_id}: {problem}")
    pixels = torch.empty(num_frames, 3, clip.height, clip.width, dtype=torch.uint8)
    for k, frame in enumerate(_source_frames(clip, num_frames)):
        if problem := cover_problem(
            *frame.shape[:2],
            height=clip.height,
            width=clip.width,
            sample_aspect=sample_aspect(clip.transform),
        ):
            raise MediaError("bad_size", f"{clip.path}: {problem}")
        pixels[k : k + 1] = resize_and_crop(
            frame[None],
            height=clip.height,
            width=clip.width,
            sample_aspect=sample_aspect(clip.transform),
        )
    return pixels


def _source_frames(clip: Clip, num_frames: int) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    if clip.kind == "images":
        if clip.num_frames != 1:
            raise MediaError("bad_size", f"clip {clip.clip_id}: an image is one frame")
        yield image.read(clip.path)[0]
        return
    # Here, because .npz clips and images need no PyAV.
    from wanlora.media.colour import ASSUMABLE  # noqa: PLC0415
    from wanlora.media.decode import iter_frames  # noqa: PLC0415

    yield from iter_frames(
        clip.path,
        start_s=clip.start_s,
        fps=clip.fps,
        num_frames=num_frames,
        matrix=_known(clip, "matrix", ASSUMABLE),
        coarse=_known(clip, "timestamps", [COARSE]) is not None,
    )


def _known(clip: Clip, rule: str, names: Collection[str]) -> str | None:
    """Read an optional pixel rule of a line; an unknown name is an error, as it changes pixels."""
    value = clip.transform.get(rule)
    if value is not None and value not in names:
        raise MediaError(
            "unreadable",
            f"clip {clip.clip_id}: transform {rule} {value!r}; expected {' or '.join(names)}; "
            "write the manifest again with: wanlora prepare",
        )
    return value


def to_signed(frames: UInt8[torch.Tensor, "*shape"]) -> Float32[torch.Tensor, "*shape"]:
    """Map 0..255 to [-1, 1]: `x / 127.5 - 1`, in float32."""
    return frames.to(torch.float32).div_(127.5).sub_(1.0)


class ClipDataset(Dataset[Item]):
    """Clips of a manifest as tensors: `frames` float32 `[T, C, H, W]` in [-1, 1].

    Bad lines of the manifest are logged and left out. A clip that cannot be loaded raises
    MediaError when it is reached; `wanlora verify` lists them beforehand.

    Args:
        path: A manifest, or a folder, which means its train.jsonl and val.jsonl.

    Raises:
        ManifestError: The manifest is missing, or none of its lines can be used.
    """

    def __init__(self, path: str | Path) -> None:
        self.clips = manifest.read_all([Path(path)])

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Item:
        clip = self.clips[index]
        return {
            "frames": to_signed(load_clip(clip)),
            "prompt": clip.prompt,
            "clip_id": clip.clip_id,
            "activity": clip.activity,
        }


def collate_fn(items: Sequence[Item]) -> Batch:
    """Stack clips of one size: `frames` float32 `[B, T, C, H, W]`.

    Raises:
        ManifestError: The clips differ in size.
    """
    shapes = {tuple(item["frames"].shape): item["clip_id"] for item in items}
    if len(shapes) > 1:
        found = "; ".join(f"{clip_id}: {list(shape)}" for shape, clip_id in shapes.items())
        raise ManifestError(
            f"clips of different sizes cannot share a batch ({found}); use batch_size=1, or "
            "prepare them at one size with --short drop"
        )
    return {
        "frames": torch.stack([item["frames"] for item in items]),
        "prompts": [item["prompt"] for item in items],
        "clip_ids": [item["clip_id"] for item in items],
        "activities": [item["activity"] for item in items],
    }
