"""Pixels of the first frames: of image files, and of cached clips, at the size of the videos.

Owns: their conversion to that size, the same as for a clip: scaled to cover it, then cropped around
the centre. Legend: h w height and width.
"""

import logging
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from wanlora.commands.sample.first_frames import ClipFrame, FirstFrame, ImageFile
from wanlora.commands.sample.videos import Video
from wanlora.core.aspect import cover_problem, cover_size, nearest_size
from wanlora.core.kinds import Kind
from wanlora.errors import ConfigError
from wanlora.media import image
from wanlora.media.transform import resize_and_crop
from wanlora.progress import waiting
from wanlora.store.reader import StoreReader
from wanlora.wan.encoders import decode_latents, load_vae
from wanlora.wan.variants import VARIANTS, Variant

CROPPED_SHARE = 0.1
"""Share of a picture that is cropped without advice to change the size of the videos."""

LATENTS: tuple[Kind, ...] = ("latents",)

Picture = UInt8[np.ndarray, "h w 3"]

logger = logging.getLogger(__name__)


def first_frames(
    videos: Sequence[Video],
    *,
    height: int,
    width: int,
    folder: Path,
    variant: Variant,
    device: torch.device,
) -> Mapping[str, Picture]:
    """Read the first frames of videos, and log how each becomes one of the given size.

    The VAE decodes the frames of cached clips, and is released before the pipeline is loaded.

    Args:
        videos: The videos; those of a text-to-video model have no first frames.
        height: Height of the videos, px.
        width: Width of the videos, px.
        folder: The model's folder.
        variant: Its variant.
        device: Device that computes.

    Returns:
        Pixels by the key of the first frame.

    Raises:
        ConfigError: An image is too long and narrow, or a cache is of another VAE.
        MediaError: An image was changed or removed.
        StoreError: A clip is missing in the store.
    """
    wanted = {video.image.key: video.image for video in videos if video.image}
    found = {
        key: image.read(item.path)[0] for key, item in wanted.items() if isinstance(item, ImageFile)
    }
    clips = {key: item for key, item in wanted.items() if isinstance(item, ClipFrame)}
    if clips:
        found |= _of_clips(clips, folder=folder, variant=variant, device=device)
    return {
        key: _fitted(wanted[key], pixels, height=height, width=width)
        for key, pixels in found.items()
    }


def _of_clips(
    clips: Mapping[str, ClipFrame], *, folder: Path, variant: Variant, device: torch.device
) -> dict[str, Picture]:
    """Decode the first latent frame of cached clips: it is the first frame, alone."""
    any_clip = next(iter(clips.values()))
    cache, view = any_clip.cache, any_clip.view
    made_by = VARIANTS.get(view.variant)
    if made_by is None or made_by.vae != variant.vae:
        raise ConfigError(
            f"--cache {cache} holds latents of {view.model} ({view.variant}), which the VAE of "
            f"{variant.name} cannot decode to first frames: pass --image FILE, or a cache of this "
            "model"
        )
    reader = StoreReader.of_view(cache, view, LATENTS)
    vae = load_vae(folder, dtype=torch.float32, device=device, tf32=True)
    found = {}
    with waiting(f"decoding the first frames of {len(clips)} cached clips"):
        for key, item in clips.items():
            latents = torch.from_numpy(reader.latents(item.clip.key)[:, :1].astype(np.float32))
            found[key] = decode_latents(vae, latents[None])[0, 0].cpu().numpy()
    return found


def _fitted(item: FirstFrame, pixels: Picture, *, height: int, width: int) -> Picture:
    """Scale and crop a picture to a size, and log it."""
    own_height, own_width = pixels.shape[:2]
    if problem := cover_problem(own_height, own_width, height=height, width=width):
        raise ConfigError(f"first frame {item.name}: {problem}")
    scaled = cover_size(own_height, own_width, height=height, width=width)
    cropped = 1 - height * width / (scaled[0] * scaled[1])
    logger.info(
        "first frame %s: %dx%d px%s%s", item.name, own_width, own_height,
        "" if scaled == (own_height, own_width) else f", scaled to {scaled[1]}x{scaled[0]}",
        f", cropped to {width}x{height}" if cropped else "",
    )  # fmt: skip
    size = nearest_size(Fraction(own_width), own_height, area=height * width)
    if cropped > CROPPED_SHARE and size != (height, width):
        logger.warning(
            "%.0f %% of first frame %s is cropped. To keep more of it: --height %d --width %d",
            100 * cropped, item.name, *size,
        )  # fmt: skip
    frame = resize_and_crop(pixels[None], height=height, width=width)[0]
    return frame.permute(1, 2, 0).contiguous().numpy()
