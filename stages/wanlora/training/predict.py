"""One forward pass of the transformer on a micro-batch.

Owns: which tensors are fp32 and which have the transformer's type.
"""

from typing import Any

import torch

from wanlora.training import flow
from wanlora.training.batches import MicroBatch
from wanlora.wan.image_condition import model_input


def predict(
    transformer: Any, batch: MicroBatch, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the transformer on a micro-batch; return its prediction and the velocity target.

    Mixing and target are fp32; the transformer's inputs are cast to its type, the timestep stays
    float32. No autocast: it would demote the modules that diffusers keeps in fp32.

    A clip without its condition has zeros in place of the mask, of the condition and of the image's
    embeddings.
    """
    # From pageable memory only CUDA waits for the copy; MPS would read memory that is reused.
    ahead = device.type == "cuda"
    latents, noise, sigmas = (
        tensor.to(device, non_blocking=ahead)
        for tensor in (batch.latents, batch.noise, batch.sigmas)
    )
    hidden_states = flow.mix(latents, noise, sigmas)
    if batch.condition is not None:
        condition = batch.condition.to(device, non_blocking=ahead)
        hidden_states = model_input(hidden_states, condition, dropped=batch.dropped)
    prediction = transformer(
        hidden_states=hidden_states.to(dtype),
        timestep=flow.timesteps(sigmas),
        encoder_hidden_states=batch.prompt_embeds.to(device, dtype, non_blocking=ahead),
        return_dict=False,
        **_image_embeds(batch, device, dtype, non_blocking=ahead),
    )[0]
    return prediction, flow.velocity_target(latents, noise)


def _image_embeds(
    batch: MicroBatch, device: torch.device, dtype: torch.dtype, *, non_blocking: bool
) -> dict[str, torch.Tensor]:
    """Argument with the embeddings of the images; none if the transformer does not read them."""
    if batch.image_embeds is None:
        return {}
    embeds = batch.image_embeds.to(device, dtype, non_blocking=non_blocking)
    if batch.dropped is not None:
        embeds = embeds.masked_fill(batch.dropped.to(device)[:, None, None], 0)
    return {"encoder_hidden_states_image": embeds}
