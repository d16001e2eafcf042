"""First frames as conditions: their latents, and a transformer with inputs for them.

Owns: what the embedded image-to-video model has besides the text-to-video model.
Dimensions: n clips, t frames, c f h w latents, y and x pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from jaxtyping import Float, UInt8

from tools.micro.drawn_images import Example
from tools.micro.vae import encode
from wanlora import progress
from wanlora.wan.image_condition import NUM_MASK_CHANNELS


def widen(transformer: WanTransformer3DModel) -> WanTransformer3DModel:
    """Copy a text-to-video transformer with inputs for mask and condition, whose weights are zero.

    Its output is that of the narrow one until it is trained.
    """
    config = dict(transformer.config)
    narrow = config["in_channels"]
    wide = WanTransformer3DModel.from_config(
        {**config, "in_channels": 2 * narrow + NUM_MASK_CHANNELS, "out_channels": narrow}
    )
    state = transformer.state_dict()
    weight = torch.zeros_like(wide.patch_embedding.weight, dtype=torch.float32)
    weight[:, :narrow] = state["patch_embedding.weight"].float()
    wide.load_state_dict({**state, "patch_embedding.weight": weight})
    return wide


def first_frame_only(frames: UInt8[np.ndarray, "n t y x 3"]) -> Float[torch.Tensor, "n 3 t y x"]:
    """The first frame in [-1, 1], then frames of value 0."""
    alone = torch.zeros(len(frames), 3, *frames.shape[1:4])
    alone[:, :, 0] = torch.from_numpy(frames[:, 0]).movedim(-1, 1).float() / 127.5 - 1
    return alone


@torch.no_grad()
def encoded(
    vae: AutoencoderKLWan, examples: Sequence[Example], batch: int = 4
) -> tuple[Float[torch.Tensor, "n c f h w"], Float[torch.Tensor, "n c f h w"]]:
    """Normalised latents of the clips, and of their first frames followed by zeros."""
    latents: list[torch.Tensor] = []
    conditions: list[torch.Tensor] = []
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape)
    std = torch.tensor(vae.config.latents_std).view(shape)
    with progress.bar(total=len(examples), description="encode", unit="clip") as bar:
        for first in range(0, len(examples), batch):
            frames = np.stack([one.frames for one in examples[first : first + batch]])
            pixels = torch.from_numpy(frames).movedim(-1, 1).float() / 127.5 - 1
            for made, values in ((latents, pixels), (conditions, first_frame_only(frames))):
                made.append((encode(vae, values.to(vae.device))[0].cpu() - mean) / std)
            bar.update(len(frames))
    return torch.cat(latents), torch.cat(conditions)
