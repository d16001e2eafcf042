"""Make the videos: every model from the same prompts and the same noise.

Prompts and first frames are cached: no encoder is loaded. Owns: the order of work, and the record
beside each video.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from wanlora import __version__, progress
from wanlora.adapters.attach import attach, detach
from wanlora.commands.evaluate.measures import measure
from wanlora.commands.evaluate.setup import Setup
from wanlora.commands.evaluate.transformers import Transformers
from wanlora.commands.evaluate.video_plan import Model, Video, passes, video_flops
from wanlora.core import units
from wanlora.core.buckets import latent_shape
from wanlora.core.text import shorten
from wanlora.errors import ModelError
from wanlora.media import recorded
from wanlora.wan.denoise import LowNoiseExpert, denoise
from wanlora.wan.encoders import decode_latents, load_vae
from wanlora.wan.variants import Expert

logger = logging.getLogger(__name__)


def decode_clips(setup: Setup, clips: Model) -> None:
    """Decode the real clips that are missing."""
    if not clips.missing:
        return
    vae = load_vae(setup.folder, dtype=torch.float32, device=setup.device, tf32=True)
    with progress.bar(total=len(clips.missing), description="clips", unit="clip") as bar:
        for video in clips.missing:
            assert video.clip
            latents = _first_frames(setup, setup.source.latents(video.clip))
            _write(video, clips, decode_latents(vae, latents[None])[0].cpu().numpy())
            bar.update()


def make(setup: Setup, models: Sequence[Model], transformers: Transformers) -> None:
    """Make the missing videos. After a kill at any time, the finished ones remain.

    Args:
        setup: Values that are the same for all models.
        models: From `plan`.
        transformers: Loads the transformers, if a video is missing.

    Raises:
        ModelError: A video is not finite.
    """
    todo = [(model, missing) for model in models if (missing := model.missing)]
    if not todo:
        return
    loaded, in_turn = transformers.all()
    vae = load_vae(setup.folder, dtype=torch.float32, device=setup.device, tf32=True)
    number = sum(len(missing) for _, missing in todo)
    here = [item for item in loaded.values() if item.device.type == setup.device.type]
    if here:
        _log_duration(setup, here[0], number)
    with progress.bar(total=number * setup.steps, description="videos", unit="step") as bar:
        for model, missing in todo:
            for subject in model.subjects:
                attach(loaded[subject.expert], [subject.scaled])
            for place, video in enumerate(missing):
                progress.show_figures(bar, f"{model.name} {place + 1}/{len(missing)}")
                frames = generate(
                    setup, loaded, vae, video, in_turn=in_turn, on_step=lambda: bar.update(1)
                )
                _write(video, model, frames)
            for subject in model.subjects:
                detach(loaded[subject.expert])


def generate(
    setup: Setup,
    transformers: Mapping[Expert | None, Any],
    vae: Any,
    video: Video,
    *,
    in_turn: bool = False,
    on_step: Callable[[], object] = lambda: None,
) -> UInt8[np.ndarray, "t h w 3"]:
    """Make a video, equal to diffusers' from the same embeddings, condition and seed.

    Bit for bit, except for differences of the attention kernel.

    Args:
        setup: Values that are the same for all models.
        transformers: The transformers, with their adapters.
        vae: The VAE.
        video: From `plan`.
        in_turn: True to keep only the expert in use on the device.
        on_step: Called after each denoising step.

    Raises:
        ModelError: The video is not finite.
    """
    latents = denoise(
        transformers["high" if setup.is_pair else None],
        prompt_embeds=setup.source.padded_prompt(video.prompt_key),
        negative_embeds=setup.source.padded_prompt(setup.view.negative_prompt),
        shape=latent_shape(setup.bucket, setup.variant.vae.z_dim),
        steps=setup.steps,
        guidance_scale=setup.guidance_scales[0],
        shift=setup.source.shift,
        seed=video.seed,
        device=setup.device,
        dtype=setup.dtype,
        low=_low_noise_expert(setup, transformers, in_turn=in_turn),
        **_first_frame(setup, video),
        on_step=on_step,
    )
    if not torch.isfinite(latents).all():
        raise ModelError(
            f"the video for {shorten(video.prompt)}, seed {video.seed}, holds NaN: the model's or "
            f"the adapter's weights are wrong ({video.path.parent})"
        )
    return decode_latents(vae, latents[None])[0].cpu().numpy()


def _first_frame(setup: Setup, video: Video) -> dict[str, torch.Tensor]:
    """Cached condition of the clip that a video starts from, and its embeddings."""
    if video.start is None:
        return {}
    found = {"condition": _first_frames(setup, setup.source.condition(video.start))}
    if setup.variant.image_shape:
        found["image_embeds"] = setup.source.image_embeds(video.start)
    return found


def _first_frames(
    setup: Setup, latents: Float[torch.Tensor, "c n h w"]
) -> Float[torch.Tensor, "c f h w"]:
    """Latents of as many frames as the videos have: the VAE is causal."""
    return latents[:, : latent_shape(setup.bucket)[1]]


def _low_noise_expert(
    setup: Setup, transformers: Mapping[Expert | None, Any], *, in_turn: bool
) -> LowNoiseExpert | None:
    """The second transformer of a model with two."""
    if setup.variant.boundary is None:
        return None
    return LowNoiseExpert(
        transformers["low"], setup.guidance_scales[1], setup.variant.boundary, in_turn=in_turn
    )


def _log_duration(setup: Setup, transformer: Any, number: int) -> None:
    """Time the second of two forward passes at the size of the videos, and log the hours of all."""
    shape = (1, *latent_shape(setup.bucket, setup.variant.shape.in_channels))
    text = (1, setup.variant.shape.num_text_tokens, setup.variant.shape.text_dim)
    image = setup.variant.image_shape
    inputs = {
        "hidden_states": torch.zeros(shape, device=setup.device, dtype=setup.dtype),
        "timestep": torch.full((1,), 500.0, device=setup.device),
        "encoder_hidden_states": torch.zeros(text, device=setup.device, dtype=setup.dtype),
        "encoder_hidden_states_image": image
        and torch.zeros(1, *image, device=setup.device, dtype=setup.dtype),
    }
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        with torch.no_grad():
            transformer(**inputs, return_dict=False)[0].float().sum().item()  # waits for the GPU
        seconds = time.perf_counter() - started
    num_passes = setup.steps * passes(setup)
    pace = video_flops(setup, ()) / num_passes / seconds
    minutes = number * num_passes * seconds / 60
    about = f"{minutes / 60:.1f} h" if minutes > 90 else f"{max(minutes, 0.1):.1f} min"
    logger.info(
        "a forward pass takes %.3g s here (%s/s): about %s for %d videos, decoding not counted",
        seconds, units.flops(pace), about, number,
    )  # fmt: skip


def _write(video: Video, model: Model, frames: UInt8[np.ndarray, "t h w 3"]) -> None:
    record = {
        "prompt": video.prompt,
        "activity": video.activity,
        **({"first_frame_of": video.start.clip_id} if video.start else {}),
        "model": model.name,
        **_adapter_files(model),
        **video.facts,
        "measures": measure(frames),
        "wanlora": __version__,
    }
    recorded.write(video.path, frames, record=record)


def _adapter_files(model: Model) -> dict[str, Any]:
    """Adapters in the record of a video; with two transformers, by expert."""
    by_expert = {item.expert: item.scaled.record for item in model.subjects}
    if not by_expert.keys() - {None}:
        return {"adapter_file": by_expert.get(None)}
    return {"adapter_files": by_expert}
