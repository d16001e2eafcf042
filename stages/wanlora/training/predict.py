"""One forward pass of the transformer on a micro-batch.

Owns: which tensors are fp32 and which have the transformer's type.
"""

from typing import Any

import torch

from wanlora.training import flow
from wanlora.training.batches import MicroBatch


def predict(
    transformer: Any, batch: MicroBatch, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the transformer on a micro-batch; return its prediction and the velocity target.

    Mixing and target are fp32; the transformer's inputs are cast to its type, the timestep stays
    float32. No autocast: it would demote the modules that diffusers keeps in fp32.
    """
    # From pageable memory only CUDA waits for the copy; MPS would read memory that is reused.
    ahead = device.type == "cuda"
    latents, noise, sigmas = (
        tensor.to(device, non_blocking=ahead)
        for tensor in (batch.latents, batch.noise, batch.sigmas)
    )
    prediction = transformer(
        hidden_states=flow.mix(latents, noise, sigmas).to(dtype),
        timestep=flow.timesteps(sigmas),
        encoder_hidden_states=batch.prompt_embeds.to(device, dtype, non_blocking=ahead),
        return_dict=False,
    )[0]
    return prediction, flow.velocity_target(latents, noise)
