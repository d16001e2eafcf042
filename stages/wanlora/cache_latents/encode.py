"""The two encoders at work, one after the other, each row written as soon as it is there.

Owns: the loops over prompts and clips, decoding ahead of them, and the check of the VAE. Whatever
ends a loop early, what it has encoded is published.
Legend: t frames, c channels, f latent frames, h w height and width.
"""

import gc
import logging
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from jaxtyping import Float, UInt8

from wanlora.cache_latents.plan import Failure, KeyedClip, Plan
from wanlora.clips import load_clip
from wanlora.config import CacheLatentsConfig
from wanlora.core.buckets import latent_shape
from wanlora.core.latent_rgb import normal_equations
from wanlora.core.quality import psnr
from wanlora.errors import MediaError, ModelError
from wanlora.manifest import Clip
from wanlora.progress import bar
from wanlora.store.schema import MAX_TOKENS
from wanlora.store.writer import SegmentWriter
from wanlora.wan import encoders
from wanlora.wan.variants import Variant

log = logging.getLogger(__name__)


def encode_prompts(
    config: CacheLatentsConfig, plan: Plan, *, folder: Path, device: torch.device
) -> list[str]:
    """Load UMT5, encode the missing prompts, write them, and free it.

    Returns:
        The prompts whose end was cut off because they have over 512 tokens.
    """
    dtype = getattr(torch, config.text_dtype)
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
) -> dict[str, Failure]:
    """Load the VAE, encode the missing clips, write them, and free it.

    Returns:
        Why a clip could not be decoded, by clip key.

    Raises:
        ModelError: The VAE cannot give back the first clip; no latents have been written then.
    """
    vae = encoders.load_vae(
        folder, dtype=getattr(torch, config.vae_dtype), device=device, tf32=config.tf32
    )
    to_check: Variant | None = _to_check(config, variant)
    failures: dict[str, Failure] = {}
    channels = int(plan.latents_provenance["z_dim"])
    with (
        closing(_decode_ahead(plan.missing_clips, config.decode_workers)) as decoded,
        bar(total=len(plan.missing_clips), description="latents", unit="clip") as progress,
    ):
        for bucket, group in groupby(decoded, key=lambda item: item[0].clip.bucket):
            shape = latent_shape(bucket, channels)
            with _writer(config, "latents", plan.latents_provenance, shape, device) as writer:
                for keyed, frames in group:
                    progress.update(1)
                    if isinstance(frames, MediaError):
                        failures[keyed.key] = Failure(frames.code, keyed.clip.clip_id, str(frames))
                        continue
                    latents = encoders.encode_latents(vae, frames.permute(1, 0, 2, 3)[None])
                    pixels = frames.permute(0, 2, 3, 1).numpy()
                    if to_check is not None:
                        check_vae(vae, latents, pixels, variant=to_check, clip=keyed.clip)
                        to_check = None
                    row = latents[0].cpu().numpy()
                    rgb = normal_equations(row, pixels)
                    writer.add(keyed.key, row, source=_source(keyed.clip), rgb=rgb)
    del vae
    _free_memory()
    return failures


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


def _decode_ahead(
    clips: Sequence[KeyedClip], workers: int
) -> Generator[tuple[KeyedClip, UInt8[torch.Tensor, "t 3 h w"] | MediaError], None, None]:
    """Decode clips in order, in threads, at most `workers` + 1 of them ahead of the encoder."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    ahead: deque[tuple[KeyedClip, Future[torch.Tensor | MediaError]]] = deque()
    todo = iter(clips)
    try:
        while True:
            while len(ahead) <= workers and (keyed := next(todo, None)) is not None:
                ahead.append((keyed, pool.submit(_decode, keyed.clip)))
            if not ahead:
                return
            keyed, future = ahead.popleft()
            yield keyed, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


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
        writer={"model": config.model, "device": str(device), "torch": str(torch.__version__)},
    )


def _source(clip: Clip) -> dict[str, Any]:
    """Where a row comes from, for people who look at a commit record."""
    return {
        "clip_id": clip.clip_id,
        "path": clip.source,
        "start_s": clip.start_s,
        "fps": clip.fps,
        "bucket": list(clip.bucket),
    }


def _free_memory() -> None:
    """Give an encoder's memory back before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
