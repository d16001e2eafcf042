"""Denoise latents with the transformer alone, for previews while training.

Owns: the sampling loop of diffusers' WanPipeline, step for step, without its VAE and text encoder.
Must not import a pipeline. Legend: l tokens (512), d text width, c f h w latents.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from jaxtyping import Float, Float32


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
    on_step: Callable[[], object] = lambda: None,
) -> Float32[torch.Tensor, "c f h w"]:
    """Make the latents of one video, bit for bit those of `WanPipeline(output_type="latent")`.

    Guided velocity: v = v_negative + guidance_scale (v_prompt - v_negative); noise from
    `torch.Generator("cpu").manual_seed(seed)`, the same on every device. No global random state is
    read or changed.

    Args:
        transformer: Transformer, with its adapter if it has one.
        prompt_embeds: Padded to 512 rows.
        negative_embeds: Padded to 512 rows; not read without guidance.
        shape: `c f h w` of the latents.
        steps: Denoising steps.
        guidance_scale: 1 or less for no guidance.
        shift: Shift of sigma (the scheduler's flow_shift).
        seed: Seed of this video's noise.
        device: Device of the computation.
        dtype: The transformer's type.
        on_step: Called after each denoising step.

    Returns:
        Latents on the CPU.
    """
    scheduler = _scheduler(shift, steps, device)
    noise = torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed))
    latents = noise.to(device)
    prompt = prompt_embeds[None].to(device, dtype)
    negative = negative_embeds[None].to(device, dtype)

    def velocity(timestep: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        prediction: torch.Tensor = transformer(
            hidden_states=latents.to(dtype),
            timestep=timestep,
            encoder_hidden_states=embeds,
            return_dict=False,
        )[0]
        return prediction

    for t in scheduler.timesteps:
        guided = velocity(t.expand(1), prompt)
        if guidance_scale > 1:
            unguided = velocity(t.expand(1), negative)
            guided = unguided + guidance_scale * (guided - unguided)
        latents = scheduler.step(guided, t, latents, return_dict=False)[0]
        on_step()
    return latents[0].cpu()


def _scheduler(shift: float, steps: int, device: torch.device) -> Any:
    """Set up Wan's scheduler as WanPipeline does."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps, device=device)
    scheduler.set_begin_index(0)
    return scheduler
