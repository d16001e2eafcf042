"""Seconds per clip of stage one's models at full size: `python bench/encoders.py`.

Random weights in the real configurations, made on the device. The VAE encodes 81x480x832 in
float32 with TF32 convolutions (as `cache-latents` does) and in bf16, eager and with its norms
compiled. UMT5 encodes a prompt of 512 tokens. Then the share of the time that the VAE waits for
clips, decoded by threads from .npz files and from a video. On a CPU: tiny models, whose figures
mean nothing, and nothing is compiled.
"""

import statistics
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import figures
import models
import numpy as np
import rates
import stage_one
import torch

from wanlora.commands.cache_latents.prefetch import Prefetcher, prefetch_depth
from wanlora.config import CacheLatentsConfig
from wanlora.core.buckets import Bucket
from wanlora.data.clip_frames import load_clip
from wanlora.wan.encoders import encode_latents

NUM_CLIPS = 10
WORTH_STARTING_S = 8.0
"""Time left below which no further figure is started."""


def frames_of(bucket: Bucket) -> torch.Tensor:
    """Smooth random frames with some noise, uint8 `1 3 t h w`."""
    t, h, w = bucket
    draws = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, (t + 3) // 4, h // 16, w // 16, generator=draws)
    smooth = torch.nn.functional.interpolate(coarse, size=(t, h, w), mode="trilinear")
    return (255 * smooth).to(torch.uint8)


def make_vae(device: torch.device, dtype: torch.dtype, *, tf32: bool, compiled: bool, tiny: bool):
    torch.backends.cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision("highest")
    vae = models.vae(device, tiny=tiny)
    for tensor in vae.parameters():
        tensor.data = tensor.data.to(dtype)
    if compiled:
        torch.compiler.reset()
        torch._dynamo.config.recompile_limit = 1024  # a norm has many sizes; 8 would be the limit
        for module in vae.encoder.modules():
            if type(module).__name__ == "WanRMS_norm":
                module.compile(dynamic=True)
    return vae


@torch.no_grad()
def vae_seconds(
    device: torch.device, bucket: Bucket, dtype: str, *, compiled: bool, tiny: bool
) -> dict:
    """Seconds of a clip from uint8 frames on the host to latents, and the peak of memory."""
    if compiled and device.type == "cpu":
        return {"skipped": "compiled on a GPU only"}
    vae = make_vae(device, getattr(torch, dtype), tf32=True, compiled=compiled, tiny=tiny)
    frames = frames_of(bucket)

    def encode() -> None:
        encode_latents(vae, frames).cpu()

    (first,) = rates.timed(encode, device, 1)
    seconds = statistics.median(rates.timed(encode, device, 1 if tiny else 3))
    return {"seconds": seconds, "first_s": first, "peak_gb": rates.peak_gb(device)}


@torch.no_grad()
def text_seconds(device: torch.device, *, tiny: bool) -> dict:
    """Seconds to make UMT5-XXL in bf16 on the device, and to encode a prompt."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    started = time.perf_counter()
    encoder = models.text_encoder(device, dtype, tiny=tiny)
    rates.synchronize(device)
    made = time.perf_counter() - started
    ids = torch.randint(1, 400, (1, 512), device=device)
    mask = torch.ones_like(ids)

    def encode() -> None:
        encoder(ids, mask).last_hidden_state.cpu()

    rates.timed(encode, device, 2)
    seconds = statistics.median(rates.timed(encode, device, 1 if tiny else 3))
    return {"seconds": seconds, "made_s": made, "peak_gb": rates.peak_gb(device)}


def npz_of(root: Path, bucket: Bucket) -> Path:
    """A clip as the seed's preprocessing writes it: compressed."""
    path = root / "clip.npz"
    frames = frames_of(bucket)[0].permute(1, 2, 3, 0).numpy()
    np.savez_compressed(path, frames=frames)
    return path


@torch.no_grad()
def wait(kind: str, device: torch.device, bucket: Bucket, *, tiny: bool) -> dict:
    """Share of the time that the encoder waits, with the defaults of `cache-latents`."""
    if kind == "video" and find_spec("av") is None:
        return {"skipped": "PyAV is not installed, so no video can be decoded"}
    defaults = {n: f.default for n, f in CacheLatentsConfig.model_fields.items()}
    threads, most = defaults["decode_workers"], defaults["decode_bytes"]
    vae = make_vae(device, torch.float32, tf32=True, compiled=False, tiny=tiny)
    with tempfile.TemporaryDirectory(prefix="wanlora-bench-") as root:
        path = npz_of(Path(root), bucket) if kind == "npz" else stage_one.real_video(Path(root))
        size = dict(zip(("num_frames", "height", "width"), bucket, strict=True))
        clips = [
            stage_one.clip_of(path, i, tiny=tiny, kind=kind, **size)
            for i in range(2 if tiny else NUM_CLIPS)
        ]
        depth = prefetch_depth(
            3 * bucket[0] * bucket[1] * bucket[2], threads=threads, max_bytes=most
        )
        ahead = Prefetcher(load_clip, clips, threads=threads, depth=depth)
        started, first = time.monotonic(), None
        for _, frames in ahead:
            if first is None:
                first, started = ahead.waited_s, time.monotonic()
            encode_latents(vae, frames.movedim(0, 1)[None]).cpu()
        total = time.monotonic() - started
        ahead.close()
    return {
        "clips": len(clips), "decode_threads": threads, "first_clip_s": first,
        "seconds_per_clip": total / len(clips),
        "stall_after_it": (ahead.waited_s - first) / total,
    }  # fmt: skip


def main() -> None:
    options = figures.phase_options(__doc__).parse_args()
    cuda = torch.cuda.is_available()
    tiny = options.tiny or not cuda
    device = torch.device("cuda" if cuda else "cpu")
    bucket = Bucket(5, 32, 48) if tiny else Bucket(81, 480, 832)
    clock, results = figures.Clock(options.seconds), figures.Results(options.output)
    results.note(machine=rates.machine(), tiny=tiny, geometry=str(bucket))
    vae = partial(vae_seconds, device, bucket, tiny=tiny)
    parts = {
        "vae float32+tf32 eager": partial(vae, "float32", compiled=False),
        "vae bfloat16 eager": partial(vae, "bfloat16", compiled=False),
        "wait npz": partial(wait, "npz", device, bucket, tiny=tiny),
        "umt5 bfloat16": partial(text_seconds, device, tiny=tiny),
        "wait video": partial(wait, "video", device, bucket, tiny=tiny),
        "vae bfloat16 norms compiled": partial(vae, "bfloat16", compiled=True),
        "vae float32+tf32 norms compiled": partial(vae, "float32", compiled=True),
    }
    for name, part in parts.items():
        if clock.left_s < WORTH_STARTING_S:
            results.note(**{name: {"error": "not measured: no time was left"}})
            continue
        rates.free(device)
        results.attempt(name, part)


if __name__ == "__main__":
    main()
