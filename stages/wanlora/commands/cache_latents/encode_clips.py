"""Encode clips to rows of one kind; each row is written as soon as it is encoded.

    decode threads -> bounded queue, pinned -> encoder (the caller) -> write thread -> segments

Owns: the loop over clips. If anything ends the loop early, the encoded rows are published.
Legend: t frames, h w height and width.
"""

import time
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby
from typing import Any, Protocol

import numpy as np
import torch

from wanlora.commands.cache_latents.clip_keys import Failure
from wanlora.commands.cache_latents.clip_kinds import CLIP_KINDS
from wanlora.commands.cache_latents.encode_prompts import Progress
from wanlora.commands.cache_latents.encode_settings import EncodeSettings
from wanlora.commands.cache_latents.encoder_memory import (
    explain_out_of_memory,
    free_memory,
    half_memory,
)
from wanlora.commands.cache_latents.find_encoders import Encoders
from wanlora.commands.cache_latents.prefetch import Prefetcher, WriteBehind, prefetch_depth
from wanlora.commands.cache_latents.segments import open_writer
from wanlora.core.buckets import Bucket
from wanlora.core.kinds import Kind
from wanlora.data.clip import Clip
from wanlora.errors import MediaError
from wanlora.store.latent_rgb import normal_equations
from wanlora.store.writer import SegmentWriter
from wanlora.wan.device import current_in_thread
from wanlora.wan.model_folder import ENCODER_PARTS


class DecodeClip(Protocol):
    """Return a clip's frames, uint8 `[T, 3, H, W]`, or the reason for failure; called in threads.

    With `num_frames`, only this many frames from the start.
    """

    def __call__(self, clip: Clip, num_frames: int | None) -> torch.Tensor | MediaError:
        """Decode the clip."""


@dataclass(frozen=True, slots=True)
class EncodedClips:
    """Result of encoding clips.

    Attributes:
        rows: Number of encoded clips.
        failures: Reason why a clip could not be decoded, by clip key.
        seconds: Time from the first clip to the last, without loading the model.
        stall: Share of it that the encoder waited for decoded clips.
        twice: Superfluous copies of rows, made by two workers at once.
    """

    rows: int = 0
    failures: Mapping[str, Failure] = field(default_factory=dict)
    seconds: float = 0.0
    stall: float = 0.0
    twice: int = 0


@dataclass(frozen=True, slots=True)
class _Row:
    """A clip to encode, its key, and the number of its chunk."""

    chunk: int
    key: str
    clip: Clip

    @property
    def group(self) -> tuple[int, Bucket]:
        """Chunk and bucket; rows with the same values have the same writer."""
        return self.chunk, self.clip.bucket


def encode_clips(
    settings: EncodeSettings,
    encoders: Encoders,
    kind: Kind,
    chunks: Iterable[Mapping[str, Clip]],
    progress: Progress,
    *,
    largest_clip_bytes: int,
    committed: Callable[[], Container[str]] = frozenset,
    decode_clip: DecodeClip,
) -> EncodedClips:
    """Load a model, encode clips, write them, and free it; without any clip it is not loaded.

    Decoding starts before the model is loaded. Decoding and writing go on while clips are encoded.

    Args:
        settings: The cache, the types and the limits.
        encoders: The model's folder and thresholds, and the device.
        kind: Kind of the rows, of `CLIP_KINDS`.
        chunks: Clips of one bucket by key, read as decoding gets to them; each chunk is committed
            before the next one is encoded.
        progress: Called for every clip.
        largest_clip_bytes: Bytes of the decoded frames of the largest clip.
        committed: Returns the rows that others have made; called before each chunk is encoded.
        decode_clip: Decodes a clip.

    Raises:
        ModelError: The check of the first clip failed; no row has been written then.
        DeviceError: Out of memory; names what to change.
    """
    chunks = iter(chunks)
    if (first := next(chunks, None)) is None:
        return EncodedClips()
    numbered = enumerate(chain([first], chunks))
    todo = (_Row(i, key, clip) for i, chunk in numbered for key, clip in chunk.items())
    rows, failures = 0, {}
    how = CLIP_KINDS[kind]
    work = partial(decode_clip, num_frames=how.num_frames)
    prefetcher = _prefetch(settings, encoders.device, todo, largest_clip_bytes, work)
    with closing(prefetcher) as decoded:
        encode = how.open(settings, encoders)
        started = time.monotonic()
        for (_, bucket), group in groupby(decoded, key=lambda item: item[0].group):
            there = committed()
            shape = how.shape(encoders.provenance(kind), bucket)
            with (
                open_writer(settings, encoders, kind, shape) as writer,
                WriteBehind() as behind,
            ):
                for row, frames in group:
                    if isinstance(frames, MediaError):
                        failures[row.key] = Failure(frames.code, row.clip.clip_id, str(frames))
                    elif row.key not in there:
                        with explain_out_of_memory(*_encoding(settings, kind, row.clip)):
                            values = encode(row.clip, row.key, frames)
                        behind.submit(_write, writer, row, values, frames if how.fits_rgb else None)
                        rows += 1
                    stall = decoded.waited_s / max(time.monotonic() - started, 1e-9)
                    progress(1, f"encoder waits {stall:.0%}")
        seconds = time.monotonic() - started
    del encode
    free_memory()
    stall = min(1.0, decoded.waited_s / max(seconds, 1e-9))
    return EncodedClips(rows, failures, seconds, stall)


def _write(
    writer: SegmentWriter, row: _Row, values: np.ndarray, frames: torch.Tensor | None
) -> None:
    """Add a row; runs in the write thread, with the fit to RGB, compression and fsync.

    Args:
        writer: Writer of the row's segment.
        row: The row.
        values: Its values.
        frames: Frames `[T, 3, H, W]` to fit, if the kind of row has the fit to RGB.
    """
    rgb = None
    if frames is not None:
        rgb = normal_equations(values, frames.permute(0, 2, 3, 1).numpy())
    writer.add(row.key, values, source=_source(row.clip), rgb=rgb)


def _encoding(settings: EncodeSettings, kind: Kind, clip: Clip) -> list[str]:
    """Describe the encoding of a clip, and what to change if memory runs out."""
    half = half_memory("vae_dtype", settings.vae_dtype) if "vae" in ENCODER_PARTS[kind] else []
    return [
        f"encoding clip {clip.clip_id} of {clip.bucket}",
        "stop other programs that use the device", *half, "prepare smaller or shorter clips",
    ]  # fmt: skip


def _source(clip: Clip) -> dict[str, Any]:
    """Origin of a row, for people who read its commit record."""
    return {
        "clip_id": clip.clip_id,
        "path": str(clip.path),
        "kind": clip.kind,
        "start_s": clip.start_s,
        "fps": clip.fps,
        "bucket": list(clip.bucket),
        "transform": clip.transform,
    }


def _prefetch(
    settings: EncodeSettings,
    device: torch.device,
    rows: Iterable[_Row],
    largest_clip_bytes: int,
    decode_clip: "Callable[[Clip], torch.Tensor | MediaError]",
) -> Prefetcher[_Row, "torch.Tensor | MediaError"]:
    def work(row: _Row) -> torch.Tensor | MediaError:
        with explain_out_of_memory(
            f"decoding clip {row.clip.clip_id}", "lower --set decode_workers or decode_bytes",
            "prepare smaller or shorter clips",
        ):  # fmt: skip
            frames = decode_clip(row.clip)
            pinned = device.type == "cuda" and isinstance(frames, torch.Tensor)
            return frames.pin_memory() if pinned else frames  # type: ignore[union-attr]

    threads = settings.decode_threads
    depth = prefetch_depth(largest_clip_bytes, threads=threads, max_bytes=settings.decode_bytes)
    first = current_in_thread(device)  # pinning memory needs a context, on this GPU
    return Prefetcher(work, rows, threads=threads, depth=depth, initializer=first)
