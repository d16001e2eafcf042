"""Previews: videos denoised with the current adapter, as latents and rough pictures.

Owns: the previews of a step and their files. No VAE is loaded: the pictures are the store's linear
projection of latents to RGB; `wanlora sample --latents` decodes the saved latents with the VAE.
Legend: n prompts, l tokens, d text width, c f h w latents.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, UInt8
from PIL import Image

from wanlora import progress
from wanlora.core.buckets import TEMPORAL_FACTOR, Bucket, latent_shape
from wanlora.files import write_atomic
from wanlora.report.gif import gif
from wanlora.runs.run_folder import PREVIEWS_NAME
from wanlora.runs.saved_latents import write_latents
from wanlora.store.latent_rgb import to_rgb
from wanlora.wan.denoise import denoise

ENLARGE = 4
"""Factor of the pictures' size; a latent pixel is 8 px wide, and half of that is enough."""

logger = logging.getLogger(__name__)


def preview(
    transformer: torch.nn.Module,
    *,
    prompt_embeds: Float[torch.Tensor, "n l d"],
    negative_embeds: Float[torch.Tensor, "l d"],
    conditions: Sequence[Mapping[str, torch.Tensor]] = (),
    bucket: Bucket,
    num_channels: int,
    steps: int,
    guidance_scale: float,
    shift: float,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    stop: Callable[[], int] = int,
    after_each: Callable[[], None] = lambda: None,
) -> list[Float32[torch.Tensor, "c f h w"]]:
    """Denoise each prompt with the current adapter; leaves the model and its gradients unchanged.

    Costs 2 n steps forward passes (n steps without guidance).

    Args:
        transformer: Transformer in training.
        prompt_embeds: Padded embeddings of the prompts.
        negative_embeds: Padded embedding of the cached negative prompt.
        conditions: Arguments of `denoise` for the first frame of each prompt; empty for text to
            video.
        bucket: Size of the videos.
        num_channels: Latent channels.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 or less means none.
        shift: Shift of sigma.
        seed: Prompt i has the seed seed + i.
        device: Device to compute on.
        dtype: The transformer's type.
        stop: Returns the number of a signal that requests a stop, or 0; checked at every step.
        after_each: Called after each prompt, also after a stop.

    Returns:
        Latents of each prompt, on the CPU; only of the prompts finished before a stop.
    """
    latents: list[Float32[torch.Tensor, "c f h w"]] = []
    with (
        _in_eval_mode(transformer),
        progress.bar(total=len(prompt_embeds) * steps, description="preview", unit="step") as bar,
    ):

        def on_step() -> None:
            bar.update(1)
            if stop():
                raise _StoppedError

        denoise_prompt = partial(
            denoise, transformer, negative_embeds=negative_embeds,
            shape=latent_shape(bucket, num_channels), steps=steps, guidance_scale=guidance_scale,
            shift=shift, device=device, dtype=dtype, on_step=on_step,
        )  # fmt: skip
        for index, embeds in enumerate(prompt_embeds):
            if not stop():
                with suppress(_StoppedError):
                    first_frame: Any = conditions[index] if conditions else {}
                    latents.append(
                        denoise_prompt(prompt_embeds=embeds, seed=seed + index, **first_frame)
                    )
            after_each()
    return latents


class _StoppedError(Exception):
    """A signal requested a stop in the middle of a preview."""


def save_previews(
    run_dir: Path,
    step: int,
    prompts: Sequence[str],
    latents: Sequence[Float32[torch.Tensor, "c f h w"]],
    projection: Float64[np.ndarray, "c1 3"] | None,
    *,
    seed: int,
    fps: float,
    facts: Mapping[str, object],
    first_frames_of: Sequence[str] = (),
) -> dict[int, UInt8[np.ndarray, "f hh ww 3"]]:
    """Write `previews/step-000500/00.safetensors` and `00.gif` for each prompt.

    Latents that are not finite are named in a warning and not saved; training continues.

    Args:
        run_dir: The run's folder.
        step: Steps done.
        prompts: Prompts of the latents.
        latents: From `preview`.
        projection: Latents to RGB (`store.latent_rgb.solve`); None = no pictures.
        seed: Seed of the first prompt, see `preview`.
        fps: Frames per second of the video whose latents these are.
        facts: More entries of the header: at least `model` and `variant`.
        first_frames_of: Id of the clip whose first frame each preview starts from; empty for text
            to video.

    Returns:
        The pictures by index of their prompt, one frame per latent frame; empty without a
        projection.
    """
    folder = run_dir / PREVIEWS_NAME / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for index, (prompt, video) in enumerate(zip(prompts, latents, strict=True)):
        if not torch.isfinite(video).all():
            logger.warning(
                "preview %d at step %d (%r) is not finite and was not saved", index, step, prompt
            )
            continue
        about = {"prompt": prompt, "seed": seed + index, "step": step, "fps": fps, **facts}
        if first_frames_of:
            about["first_frame_of"] = first_frames_of[index]
        write_latents(folder / f"{index:02d}.safetensors", video, about)
        if projection is not None:
            frames = enlarge(to_rgb(video.numpy(), projection))
            animation = gif(frames, fps=fps / TEMPORAL_FACTOR, shared_palette=True)
            write_atomic(folder / f"{index:02d}.gif", animation)
            pictures[index] = frames
    return pictures


def enlarge(frames: UInt8[np.ndarray, "f h w 3"]) -> UInt8[np.ndarray, "f hh ww 3"]:
    """Enlarge frames by `ENLARGE`, with bicubic interpolation."""
    height, width = frames.shape[1:3]
    size = (width * ENLARGE, height * ENLARGE)
    return np.stack(
        [np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in frames]
    )


@contextmanager
def _in_eval_mode(model: torch.nn.Module) -> Iterator[Any]:
    """Switch all modules to evaluation inside the block, and restore their modes after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
