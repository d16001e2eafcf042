"""Encode clips to rows of latents; each row is written as soon as it is encoded.

    decode threads -> bounded queue, pinned -> VAE (the caller) -> write thread -> segments

Owns: the loop over clips. If anything ends the loop early, the encoded rows are published.
Legend: t frames, h w height and width.
"""

import logging
import time
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from wanlora.commands.cache_latents.clip_keys import Failure
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
from wanlora.commands.cache_latents.vae_check import check_vae
from wanlora.core.buckets import Bucket, latent_shape
from wanlora.data.clip import Clip
from wanlora.errors import MediaError
from wanlora.progress import waiting
from wanlora.store.latent_rgb import normal_equations
from wanlora.store.writer import SegmentWriter
from wanlora.wan import encoders as wan_encoders
from wanlora.wan.device import current_in_thread
from wanlora.wan.encoders import Vae
from wanlora.wan.variants import Variant

DecodeClip = Callable[[Clip], "torch.Tensor | MediaError"]
"""Return a clip's frames, uint8 `[T, 3, H, W]`, or the reason for failure; called in threads."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EncodedClips:
    """Result of encoding clips.

    Attributes:
        rows: Number of encoded clips.
        failures: Reason why a clip could not be decoded, by clip key.
        seconds: Time from the first clip to the last, without loading the VAE.
        stall: Share of it that the encoder waited for decoded clips.
    """

    rows: int = 0
    failures: Mapping[str, Failure] = field(default_factory=dict)
    seconds: float = 0.0
    stall: float = 0.0


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
    chunks: Iterable[Mapping[str, Clip]],
    progress: Progress,
    *,
    largest_clip_bytes: int,
    committed: Callable[[], Container[str]] = frozenset,
    decode_clip: DecodeClip,
) -> EncodedClips:
    """Load the VAE, encode clips, write them, and free it; without any clip it is not loaded.

    Decoding starts before the VAE is loaded, and goes on while clips are encoded; so does writing.

    Args:
        settings: The cache, the types and the limits.
        encoders: The model's folder and thresholds, and the device.
        chunks: Clips of one bucket by key, read as decoding gets to them; each chunk is committed
            before the next one is encoded.
        progress: Called for every clip.
        largest_clip_bytes: Bytes of the largest decoded clip.
        committed: Returns the rows that others have made; called before each chunk is encoded.
        decode_clip: Decodes a clip.

    Raises:
        ModelError: The VAE cannot decode the first clip back; no latents have been written then.
        DeviceError: Out of memory; names what to change.
    """
    chunks = iter(chunks)
    if (first := next(chunks, None)) is None:
        return EncodedClips()
    numbered = enumerate(chain([first], chunks))
    todo = (_Row(i, key, clip) for i, chunk in numbered for key, clip in chunk.items())
    rows, failures = 0, {}
    prefetcher = _prefetch(settings, encoders.device, todo, largest_clip_bytes, decode_clip)
    with closing(prefetcher) as decoded:
        encode = _Encode(settings, _load_vae(settings, encoders), encoders.variant)
        started = time.monotonic()
        for (_, bucket), group in groupby(decoded, key=lambda item: item[0].group):
            there = committed()
            shape = latent_shape(bucket, int(encoders.provenance("latents")["z_dim"]))
            with (
                open_writer(settings, encoders, "latents", shape) as writer,
                WriteBehind() as behind,
            ):
                for row, frames in group:
                    if isinstance(frames, MediaError):
                        failures[row.key] = Failure(frames.code, row.clip.clip_id, str(frames))
                    elif row.key not in there:
                        behind.submit(_write, writer, row, *encode(row.clip, frames))
                        rows += 1
                    stall = decoded.waited_s / max(time.monotonic() - started, 1e-9)
                    progress(1, f"encoder waits {stall:.0%}")
        seconds = time.monotonic() - started
    del encode
    free_memory()
    stall = min(1.0, decoded.waited_s / max(seconds, 1e-9))
    return EncodedClips(rows, failures, seconds, stall)


class _Encode:
    """The VAE for one clip after the other; the first is also decoded back and checked.

    Args:
        settings: Type of the VAE, and whether to check it.
        vae: The VAE.
        variant: Thresholds of the check.
    """

    def __init__(self, settings: EncodeSettings, vae: Vae, variant: Variant) -> None:
        self._vae = vae
        self._advice = half_memory("vae_dtype", settings.vae_dtype)
        self._variant = variant
        self._unchecked = settings.decode_check
        if not settings.decode_check:
            log.info("the VAE is not checked (decode_check = false)")

    def __call__(
        self, clip: Clip, frames: UInt8[torch.Tensor, "t 3 h w"]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Latents `[C, F, H, W]`, and the frames `[T, H, W, 3]`."""
        pixels = frames.permute(0, 2, 3, 1).numpy()
        with explain_out_of_memory(
            f"encoding clip {clip.clip_id} of {clip.bucket}",
            "stop other programs that use the device", *self._advice,
            "prepare smaller or shorter clips",
        ):  # fmt: skip
            latents = wan_encoders.encode_latents(self._vae, frames.permute(1, 0, 2, 3)[None])
            if self._unchecked:
                check_vae(self._vae, latents, pixels, variant=self._variant, clip=clip)
                self._unchecked = False
        return latents[0].cpu().numpy(), pixels


def _write(writer: SegmentWriter, row: _Row, latents: np.ndarray, pixels: np.ndarray) -> None:
    """Add a row; runs in the write thread, with the fit to RGB, compression and fsync."""
    rgb = normal_equations(latents, pixels)
    writer.add(row.key, latents, source=_source(row.clip), rgb=rgb)


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
    decode_clip: DecodeClip,
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


def _load_vae(settings: EncodeSettings, encoders: Encoders) -> Vae:
    explained = explain_out_of_memory(
        "loading the VAE", "free the device", *half_memory("vae_dtype", settings.vae_dtype)
    )
    with waiting("loading the VAE"), explained:
        vae = wan_encoders.load_vae(
            encoders.folder,
            dtype=getattr(torch, settings.vae_dtype),
            device=encoders.device,
            tf32=settings.tf32,
        )
    encoders.require_unchanged("vae")
    return vae
