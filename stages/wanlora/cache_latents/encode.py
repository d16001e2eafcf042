"""The two encoders at work, one after the other, each row written as soon as it is there.

Owns: the loops over prompts and clips, and the check of the VAE. Whatever ends a loop early, what
it has encoded is published.
Legend: t frames, c channels, f latent frames, h w height and width.
"""

import gc
import logging
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from jaxtyping import Float, UInt8

from wanlora.cache_latents.pipeline import Ahead, Behind, depth, explaining_memory
from wanlora.cache_latents.plan import Failure, KeyedClip, Plan
from wanlora.clips import load_clip
from wanlora.config import CacheLatentsConfig
from wanlora.core.buckets import MAX_TOKENS, Bucket, latent_shape
from wanlora.core.latent_rgb import normal_equations
from wanlora.core.location import Location
from wanlora.core.quality import psnr
from wanlora.errors import MediaError, ModelError
from wanlora.manifest import Clip
from wanlora.progress import bar
from wanlora.store.writer import SegmentWriter, write_groups
from wanlora.wan import encoders
from wanlora.wan.variants import Variant

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EncodedClips:
    """How the loop over clips went.

    Attributes:
        failures: Why a clip could not be decoded, by clip key.
        seconds: From the first clip to the last, without loading the VAE.
        stall: Share of it that the encoder waited for decoded clips.
    """

    failures: dict[str, Failure]
    seconds: float
    stall: float


NOTHING = EncodedClips({}, 0.0, 0.0)
"""Where no clip was missing."""


def encode_prompts(
    config: CacheLatentsConfig, plan: Plan, *, folder: Path, device: torch.device
) -> list[str]:
    """Load UMT5, encode the missing prompts, write them, and free it.

    Returns:
        The prompts whose end was cut off because they have over 512 tokens.
    """
    dtype = getattr(torch, config.text_dtype)
    with explaining_memory(
        "loading the text encoder", "free the device (UMT5-XXL takes 11.4 GB in bfloat16)",
        *_halved("text_dtype", config.text_dtype), "choose another device with --device",
    ):  # fmt: skip
        encoder = encoders.load_text_encoder(folder, dtype=dtype, device=device)
    text_dim = int(plan.text_provenance["text_dim"])
    truncated = []
    with (
        _writer(
            config, "text", plan.text_provenance, (MAX_TOKENS, text_dim), device
        ) as writer,
        bar(total=len(plan.missing_prompts), description="prompts", unit="prompt") as progress,
    ):  # fmt: skip
        for key, prompt in plan.missing_prompts.items():
            if encoders.num_prompt_tokens(encoder.tokenizer, prompt) > MAX_TOKENS:
                truncated.append(prompt)
            (embeds,) = encoders.encode_prompts(encoder, [prompt])
            writer.add(key, embeds.float().numpy(), source=prompt)
            progress.update(1)
    del encoder
    _free_memory()
    return truncated


def encode_clips(
    config: CacheLatentsConfig, plan: Plan, *, folder: Path, variant: Variant, device: torch.device
) -> EncodedClips:
    """Load the VAE, encode the missing clips, write them, and free it.

    Decoding starts before the VAE is loaded, and goes on while clips are encoded; so does writing.

    Raises:
        ModelError: The VAE cannot give back the first clip; no latents have been written then.
        DeviceError: Out of memory; says what to change.
    """
    failures: dict[str, Failure] = {}
    with closing(_decode_ahead(config, plan.missing_clips, device)) as decoded:
        with explaining_memory(
            "loading the VAE", "free the device", *_halved("vae_dtype", config.vae_dtype)
        ):
            vae = encoders.load_vae(
                folder, dtype=getattr(torch, config.vae_dtype), device=device, tf32=config.tf32
            )
        encode = _Encode(config, vae, _to_check(config, variant))
        started = time.monotonic()
        with bar(total=len(plan.missing_clips), description="latents", unit="clip") as progress:
            for bucket, group in groupby(decoded, key=lambda item: item[0].clip.bucket):
                with _latents_writer(config, plan, bucket, device) as writer, Behind() as behind:
                    for keyed, frames in group:
                        if isinstance(frames, MediaError):
                            clip_id = keyed.clip.clip_id
                            failures[keyed.key] = Failure(frames.code, clip_id, str(frames))
                        else:
                            behind.do(_write, writer, keyed, *encode(keyed.clip, frames))
                        stall = decoded.waited_s / max(time.monotonic() - started, 1e-9)
                        progress.set_postfix_str(f"encoder waits {stall:.0%}", refresh=False)
                        progress.update(1)
        seconds = time.monotonic() - started
    del vae, encode
    _free_memory()
    return EncodedClips(failures, seconds, min(1.0, decoded.waited_s / max(seconds, 1e-9)))


class _Encode:
    """The VAE on one clip after the other; the first is also decoded back and checked."""

    def __init__(
        self, config: CacheLatentsConfig, vae: AutoencoderKLWan, to_check: Variant | None
    ) -> None:
        self._vae = vae
        self._logvar = config.store.logvar
        self._options = _halved("vae_dtype", config.vae_dtype)
        self._to_check = to_check

    def __call__(
        self, clip: Clip, frames: UInt8[torch.Tensor, "t 3 h w"]
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Latents and, if wanted, log-variances `[C, F, H, W]`, and the frames `[T, H, W, 3]`."""
        pixels = frames.permute(0, 2, 3, 1).numpy()
        with explaining_memory(
            f"encoding clip {clip.clip_id} of {clip.bucket}",
            "stop what else uses the device", *self._options,
            "prepare smaller or shorter clips",
        ):  # fmt: skip
            latents, logvar = encoders.encode_posterior(self._vae, frames.permute(1, 0, 2, 3)[None])
            if self._to_check is not None:
                check_vae(self._vae, latents, pixels, variant=self._to_check, clip=clip)
                self._to_check = None
        spread = logvar[0].cpu().numpy() if self._logvar else None
        return latents[0].cpu().numpy(), spread, pixels


def _halved(setting: str, dtype: str) -> list[str]:
    """What to set for half the memory, unless it is set."""
    return [] if dtype == "bfloat16" else [f"--set {setting}=bfloat16 (half the memory)"]


def _write(
    writer: SegmentWriter,
    keyed: KeyedClip,
    latents: np.ndarray,
    logvar: np.ndarray | None,
    pixels: np.ndarray,
) -> None:
    """Add a row; runs in the write thread, with the fit to RGB, compression and fsync."""
    rgb = normal_equations(latents, pixels)
    writer.add(keyed.key, latents, source=_source(keyed.clip), rgb=rgb, logvar=logvar)


def _decode_ahead(
    config: CacheLatentsConfig, clips: Sequence[KeyedClip], device: torch.device
) -> Ahead[KeyedClip, "torch.Tensor | MediaError"]:
    def work(keyed: KeyedClip) -> torch.Tensor | MediaError:
        frames = _decode(keyed.clip)
        pinned = device.type == "cuda" and isinstance(frames, torch.Tensor)
        return frames.pin_memory() if pinned else frames  # type: ignore[union-attr]

    sizes = [3 * prod(keyed.clip.bucket) for keyed in clips]
    threads = config.decode_workers
    most = depth(sizes, threads=threads, max_bytes=config.decode_bytes)
    return Ahead(work, clips, threads=threads, depth=most)


def _latents_writer(
    config: CacheLatentsConfig, plan: Plan, bucket: Bucket, device: torch.device
) -> SegmentWriter:
    shape = latent_shape(bucket, int(plan.latents_provenance["z_dim"]))
    bits = config.store.latent_mantissa_bits
    return _writer(config, "latents", plan.latents_provenance, shape, device, mantissa_bits=bits)


def complete_groups(cache: Location, plan: Plan, clips: Sequence[KeyedClip]) -> None:
    """Make the groups above the rows of clips that are not there; one may have been deleted."""
    channels = int(plan.latents_provenance["z_dim"])
    for bucket in {keyed.clip.bucket for keyed in clips}:
        shape = latent_shape(bucket, channels)
        write_groups(cache, "latents", plan.latents_provenance, shape)
    text_shape = (MAX_TOKENS, int(plan.text_provenance["text_dim"]))
    write_groups(cache, "text", plan.text_provenance, text_shape)


def _to_check(config: CacheLatentsConfig, variant: Variant) -> Variant | None:
    """The row of thresholds to hold the first clip against; None, and a note, without any."""
    if not config.decode_check:
        log.info("the VAE is not checked (decode_check = false)")
        return None
    if variant.min_psnr_db is None and variant.channel_std_range is None:
        log.info("the VAE is not checked (the variant %s has no thresholds)", variant.name)
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
    """Decode a clip back, and refuse a VAE whose weights are not what they are taken for.

    Raises:
        ModelError: PSNR under the variant's limit, or a channel's spread outside its range.
    """
    problems = []
    if variant.min_psnr_db is not None:
        quality = psnr(encoders.decode_latents(vae, latents)[0].cpu().numpy(), frames)
        if quality < variant.min_psnr_db:
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


def _decode(clip: Clip) -> torch.Tensor | MediaError:
    try:
        return load_clip(clip)
    except MediaError as error:
        return error


def _writer(
    config: CacheLatentsConfig,
    kind: Any,
    provenance: Any,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    mantissa_bits: int | None = None,
) -> SegmentWriter:
    store = config.store
    return SegmentWriter(
        config.cache,
        kind=kind,
        provenance=provenance,
        shape=shape,
        dtype=store.dtype,
        rows=store.clips_per_segment,
        max_bytes=store.segment_bytes,
        max_seconds=store.segment_s,
        mantissa_bits=mantissa_bits,
        writer={"model": config.model, "device": str(device), "torch": str(torch.__version__)},
    )


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
