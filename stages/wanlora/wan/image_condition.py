"""Input of an image-to-video transformer: noisy latents, mask and condition, in this order.

Owns: the mask, and the order of the channels. Imports only torch: training and sampling use it.
Source: diffusers' WanImageToVideoPipeline.prepare_latents.
Legend: b clips, c latent channels, f latent frames, h w latent height and width, i = 2 c + 4.
"""

import torch
from jaxtyping import Bool, Float

from wanlora.core.buckets import TEMPORAL_FACTOR

NUM_MASK_CHANNELS = TEMPORAL_FACTOR
"""One channel for each frame of a latent frame."""


def model_input(
    noisy: Float[torch.Tensor, "b c f h w"],
    condition: Float[torch.Tensor, "b c f h w"],
    *,
    dropped: Bool[torch.Tensor, " b"] | None = None,
) -> Float[torch.Tensor, "b i f h w"]:
    """Concatenate noisy latents, mask and condition.

    The mask is 1 in latent frame 0, whose content the condition gives, and 0 in all others.

    Args:
        noisy: Noisy latents, fp32; cast the result to the transformer's type.
        condition: Normalised latents of the first frame followed by grey frames, on the same device
            and in the same type.
        dropped: True for a clip whose condition is dropped: its mask and its condition are 0.
    """
    mask = noisy.new_zeros((len(noisy), NUM_MASK_CHANNELS, *noisy.shape[2:]))
    mask[:, :, 0] = 1
    given = torch.cat([mask, condition], dim=1)
    if dropped is not None:
        given = given.masked_fill(dropped.to(given.device)[:, None, None, None, None], 0)
    return torch.cat([noisy, given], dim=1)
