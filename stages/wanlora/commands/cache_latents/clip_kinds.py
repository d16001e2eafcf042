"""Kinds of rows that are made from the frames of a clip: which frames, which model, which shape.

Owns: a table with a row per kind, and the checks of the first clip. Must not know: the loop over
clips, workers.
Legend: t frames, c channels, f latent frames, h w height and width.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from wanlora.commands.cache_latents.encode_settings import EncodeSettings
from wanlora.commands.cache_latents.encoder_memory import explain_out_of_memory, half_memory
from wanlora.commands.cache_latents.find_encoders import Encoders
from wanlora.commands.cache_latents.vae_check import check_condition, check_vae
from wanlora.core.buckets import Bucket, latent_shape
from wanlora.core.kinds import Kind
from wanlora.data.clip import Clip
from wanlora.progress import waiting
from wanlora.store import index
from wanlora.store.row_reader import RowReader
from wanlora.wan import encoders as wan_encoders
from wanlora.wan import image_encoders
from wanlora.wan.encoders import Vae
from wanlora.wan.model_folder import ENCODER_PARTS

EncodeClip = Callable[[Clip, str, torch.Tensor], np.ndarray]
"""Makes a row from a clip, its key and its frames, uint8 `[T, 3, H, W]`."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClipKind:
    """A kind of row that is made from the frames of a clip.

    Attributes:
        open: Loads the model of the kind.
        shape: Shape of a row, from the provenance of the kind and the size of the clip.
        num_frames: Frames that a row depends on, from the start of the clip; None = all.
        fits_rgb: True if segments have the fit of these rows to RGB.
    """

    open: Callable[[EncodeSettings, Encoders], EncodeClip]
    shape: Callable[[Mapping[str, Any], Bucket], tuple[int, ...]]
    num_frames: int | None = None
    fits_rgb: bool = False

    def frames_bytes(self, bucket: Bucket) -> int:
        """Bytes of the decoded frames of a clip that a row depends on."""
        return 3 * (self.num_frames or bucket.num_frames) * bucket.height * bucket.width


class _Latents:
    """The VAE for one clip after the other; the first is also decoded back and checked."""

    def __init__(self, settings: EncodeSettings, encoders: Encoders) -> None:
        self._vae = _load_vae(settings, encoders)
        self._variant = encoders.variant
        self._unchecked = settings.decode_check
        if not settings.decode_check:
            log.info("the VAE is not checked (decode_check = false)")

    def __call__(
        self, clip: Clip, _key: str, frames: UInt8[torch.Tensor, "t 3 h w"]
    ) -> Float[np.ndarray, "c f h_8 w_8"]:
        latents = wan_encoders.encode_latents(self._vae, frames.permute(1, 0, 2, 3)[None])
        if self._unchecked:
            pixels = frames.permute(0, 2, 3, 1).numpy()
            check_vae(self._vae, latents, pixels, variant=self._variant, clip=clip)
            self._unchecked = False
        return latents[0].cpu().numpy()


class _Condition:
    """The VAE for first frames; the first is compared with the latents of its clip."""

    def __init__(self, settings: EncodeSettings, encoders: Encoders) -> None:
        self._vae = _load_vae(settings, encoders)
        self._latents: RowReader | None = None
        self._compute_dtype = settings.vae_dtype
        self._mantissa_bits = encoders.provenance("latents").get("mantissa_bits")
        if settings.decode_check:
            fingerprint = encoders.fingerprint("latents")
            rows, _ = index.lasting(settings.cache, "latents", fingerprint)
            self._latents = RowReader.of_generation(settings.cache, "latents", fingerprint, rows)

    def __call__(
        self, clip: Clip, key: str, frames: UInt8[torch.Tensor, "t 3 h w"]
    ) -> Float[np.ndarray, "c f h_8 w_8"]:
        condition = image_encoders.encode_condition(
            self._vae, frames[0], num_frames=clip.num_frames
        )
        row = condition.cpu().numpy()
        if self._latents is not None and key in self._latents.rows:
            check_condition(
                row,
                self._latents.read(key),
                clip=clip,
                compute_dtype=self._compute_dtype,
                mantissa_bits=self._mantissa_bits,
            )
            self._latents = None
        return row


class _ClipVision:
    """CLIP's vision tower for first frames."""

    def __init__(self, _settings: EncodeSettings, encoders: Encoders) -> None:
        explained = explain_out_of_memory("loading the image encoder", "free the device")
        with waiting("loading the image encoder"), explained:
            self._encoder = image_encoders.load_image_encoder(
                encoders.folder, dtype=image_encoders.IMAGE_DTYPE, device=encoders.device
            )
        _require_unchanged(encoders, "clip_vision")

    def __call__(
        self, _clip: Clip, _key: str, frames: UInt8[torch.Tensor, "t 3 h w"]
    ) -> Float[np.ndarray, "m e"]:
        return image_encoders.encode_image(self._encoder, frames[0]).numpy()


def _load_vae(settings: EncodeSettings, encoders: Encoders) -> Vae:
    explained = explain_out_of_memory(
        "loading the VAE", "free the device", *half_memory("vae_dtype", settings.vae_dtype)
    )
    with waiting("loading the VAE"), explained:
        vae = wan_encoders.load_vae(
            encoders.folder,
            dtype=getattr(torch, settings.vae_dtype),
            device=encoders.device,
            tf32=settings.tf32,
        )
    _require_unchanged(encoders, "latents")
    return vae


def _require_unchanged(encoders: Encoders, kind: Kind) -> None:
    for part in ENCODER_PARTS[kind]:
        encoders.require_unchanged(part)


def _latent_shape(provenance: Mapping[str, Any], bucket: Bucket) -> tuple[int, ...]:
    return latent_shape(bucket, int(provenance["z_dim"]))


def _embedding_shape(provenance: Mapping[str, Any], _bucket: Bucket) -> tuple[int, ...]:
    return int(provenance["num_tokens"]), int(provenance["image_dim"])


CLIP_KINDS: dict[Kind, ClipKind] = {
    "latents": ClipKind(_Latents, _latent_shape, fits_rgb=True),
    "cond_latents": ClipKind(_Condition, _latent_shape, num_frames=1),
    "clip_vision": ClipKind(_ClipVision, _embedding_shape, num_frames=1),
}
"""The kinds, in the order in which they are encoded: a condition is compared with latents."""
