"""Denoise latents with the transformer alone, for previews while training.

Owns: the sampling loop of diffusers' WanPipeline and WanImageToVideoPipeline, step for step, but
without their encoders and VAE. Must not import a pipeline.
Legend: l tokens (512), d text width, m image tokens, e image width, c f h w latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from jaxtyping import Float, Float32

from wanlora.wan.image_condition import model_input


@dataclass(frozen=True, slots=True)
class LowNoiseExpert:
    """The second transformer of a model with two, for `denoise`.

    Attributes:
        transformer: Transformer of the low-noise expert, with its adapter if it has one.
        guidance_scale: Its guidance; without effect if that of the high-noise expert is 1 or less,
            as in diffusers.
        boundary: Sigma below which it replaces the high-noise expert (`boundary_ratio`).
        in_turn: True to keep only the expert in use on the device, and the other in main memory.
    """

    transformer: Any
    guidance_scale: float
    boundary: float
    in_turn: bool = False


@torch.no_grad()
def denoise(
    transformer: Any,
    *,
    prompt_embeds: Float[torch.Tensor, "l d"],
    negative_embeds: Float[torch.Tensor, "l d"],
    shape: tuple[int, int, int, int],
    steps: int,
    guidance_scale: float,
    shift: float,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    low: LowNoiseExpert | None = None,
    condition: Float[torch.Tensor, "c f h w"] | None = None,
    image_embeds: Float[torch.Tensor, "m e"] | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> Float32[torch.Tensor, "c f h w"]:
    """Make the latents of one video, bit for bit those of diffusers with `output_type="latent"`.

    Those of WanPipeline, or with a condition those of WanImageToVideoPipeline.

    Guided velocity: v = v_negative + guidance_scale (v_prompt - v_negative); noise from
    `torch.Generator("cpu").manual_seed(seed)`, the same on every device. No global random state is
    read or changed.

    Args:
        transformer: Transformer, with its adapter if it has one; the high-noise expert of a pair.
        prompt_embeds: Padded to 512 rows.
        negative_embeds: Padded to 512 rows; not read without guidance.
        shape: `c f h w` of the latents.
        steps: Denoising steps.
        guidance_scale: 1 or less for no guidance.
        shift: Shift of sigma (the scheduler's flow_shift).
        seed: Seed of this video's noise.
        device: Device of the computation.
        dtype: The transformer's type.
        low: The low-noise expert, in a model with two transformers.
        condition: Condition latents of the first frame, for an image-to-video model.
        image_embeds: CLIP embeddings of the first frame, for a transformer that reads them.
        on_step: Called after each denoising step.

    Returns:
        Latents on the CPU.
    """
    scheduler = _scheduler(shift, steps, device)
    noise = torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed))
    latents = noise.to(device)
    prompt = prompt_embeds[None].to(device, dtype)
    negative = negative_embeds[None].to(device, dtype)
    first_frame = None if condition is None else condition[None].to(device, torch.float32)
    image = None if image_embeds is None else image_embeds[None].to(device, dtype)

    for t in scheduler.timesteps:
        expert, scale = transformer, guidance_scale
        if low:
            is_low = bool(t < low.boundary * scheduler.config.num_train_timesteps)
            expert, scale = _expert_in_use(transformer, guidance_scale, low, is_low, device)
        inputs = latents if first_frame is None else model_input(latents, first_frame)
        guided = _velocity(expert, inputs.to(dtype), t, prompt, image)
        if guidance_scale > 1:
            unguided = _velocity(expert, inputs.to(dtype), t, negative, image)
            guided = unguided + scale * (guided - unguided)
        latents = scheduler.step(guided, t, latents, return_dict=False)[0]
        on_step()
    return latents[0].cpu()


def _velocity(
    expert: Any,
    inputs: torch.Tensor,
    timestep: torch.Tensor,
    prompt_embeds: torch.Tensor,
    image_embeds: torch.Tensor | None,
) -> torch.Tensor:
    prediction: torch.Tensor = expert(
        hidden_states=inputs,
        timestep=timestep.expand(1),
        encoder_hidden_states=prompt_embeds,
        encoder_hidden_states_image=image_embeds,
        return_dict=False,
    )[0]
    return prediction


def _expert_in_use(
    high: Any, guidance_scale: float, low: LowNoiseExpert, is_low: bool, device: torch.device
) -> tuple[Any, float]:
    """Select an expert and its guidance; with `in_turn`, move it to the device first."""
    used, waiting = (low.transformer, high) if is_low else (high, low.transformer)
    if low.in_turn and used.device.type != device.type:
        waiting.to("cpu")
        used.to(device)
    return used, low.guidance_scale if is_low else guidance_scale


def _scheduler(shift: float, steps: int, device: torch.device) -> Any:
    """Set up Wan's scheduler as WanPipeline does."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps, device=device)
    scheduler.set_begin_index(0)
    return scheduler
