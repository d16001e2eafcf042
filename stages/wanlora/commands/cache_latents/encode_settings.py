"""Settings of a worker of stage one: cache, model, types and limits, as plain values.

Owns: the conversion of a command's settings, or of a view, to these values. They are picklable, so
worker processes and Ray actors receive them. Only this module, `run` and `preflight` read
`CacheLatentsConfig`. Must not import torch.
"""

from dataclasses import dataclass, replace

from wanlora.config import CacheLatentsConfig
from wanlora.core.location import Location
from wanlora.store.views import View


@dataclass(frozen=True, slots=True)
class EncodeSettings:
    """Everything that a worker needs to encode rows and write them.

    Attributes:
        cache: Cache folder or URL that the rows are written to.
        model: Name of the model: micro, a folder, or an id of the hub.
        device: Name of the device, for example cuda, or auto.
        vae_dtype: Compute type of the VAE.
        tf32: True if the VAE may use TF32 in fp32 convolutions.
        text_dtype: Compute type of the text encoder.
        store_dtype: Type of the stored rows.
        mantissa_bits: Mantissa bits of the stored latents; None keeps all.
        rows_per_segment: Maximum number of rows in a segment.
        segment_bytes: Maximum raw bytes in a segment.
        segment_s: Maximum seconds of work in a segment.
        decode_threads: Threads that decode clips ahead of the encoder.
        decode_bytes: Maximum bytes of decoded clips that wait for the encoder.
        decode_check: True to check the VAE by decoding the first clip back.
    """

    cache: Location
    model: str
    device: str
    vae_dtype: str
    tf32: bool
    text_dtype: str
    store_dtype: str
    mantissa_bits: int | None
    rows_per_segment: int
    segment_bytes: int
    segment_s: float
    decode_threads: int
    decode_bytes: int
    decode_check: bool


def of_config(config: CacheLatentsConfig) -> EncodeSettings:
    """Select the command's settings that workers need."""
    return EncodeSettings(
        cache=config.cache,
        model=config.model,
        device=config.device,
        vae_dtype=config.vae_dtype,
        tf32=config.tf32,
        text_dtype=config.text_dtype,
        store_dtype=config.store.dtype,
        mantissa_bits=config.store.latent_mantissa_bits,
        rows_per_segment=config.store.clips_per_segment,
        segment_bytes=config.store.segment_bytes,
        segment_s=config.store.segment_s,
        decode_threads=config.decode_workers,
        decode_bytes=config.decode_bytes,
        decode_check=config.decode_check,
    )


def of_view(
    view: View, *, cache: Location, device: str, rows_per_segment: int, segment_bytes: int
) -> EncodeSettings:
    """Return the settings that give the fingerprints of a view, otherwise the command's defaults.

    Args:
        view: The view whose rows will be encoded again.
        cache: Its cache folder or URL.
        device: Name of the device.
        rows_per_segment: Maximum number of rows in a segment.
        segment_bytes: Maximum raw bytes in a segment.
    """
    latents, text = view.provenance("latents"), view.provenance("text")
    return replace(
        of_config(CacheLatentsConfig()),
        cache=cache,
        model=view.model,
        device=device,
        vae_dtype=latents["compute_dtype"],
        tf32=latents["tf32"],
        text_dtype=text["compute_dtype"],
        store_dtype=latents["store_dtype"],
        mantissa_bits=latents.get("mantissa_bits"),
        rows_per_segment=rows_per_segment,
        segment_bytes=segment_bytes,
    )
