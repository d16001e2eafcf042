"""Segments of a cache for the rows of an encoder.

Owns: the records beside the rows. The store has the commit order.
"""

from collections.abc import Sequence

import torch

from wanlora.commands.cache_latents.clip_keys import KeyedClip
from wanlora.commands.cache_latents.clip_kinds import CLIP_KINDS
from wanlora.commands.cache_latents.encode_settings import EncodeSettings
from wanlora.commands.cache_latents.find_encoders import Encoders
from wanlora.core.buckets import MAX_TOKENS
from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.store.groups import write_groups
from wanlora.store.writer import SegmentWriter


def open_writer(
    settings: EncodeSettings, encoders: Encoders, kind: Kind, shape: tuple[int, ...]
) -> SegmentWriter:
    """Open a writer of rows of a kind and a shape; leaving it publishes the buffered rows."""
    return SegmentWriter(
        settings.cache,
        kind=kind,
        provenance=encoders.provenance(kind),
        shape=shape,
        dtype=settings.store_dtype,
        rows=settings.rows_per_segment,
        max_bytes=settings.segment_bytes,
        max_seconds=settings.segment_s,
        mantissa_bits=encoders.provenance(kind).get("mantissa_bits"),
        writer={
            "model": settings.model,
            "device": str(encoders.device),
            "torch": str(torch.__version__),
        },
    )


def write_missing_groups(cache: Location, encoders: Encoders, clips: Sequence[KeyedClip]) -> None:
    """Write missing groups above the rows of clips; one may have been deleted."""
    for bucket in {keyed.clip.bucket for keyed in clips}:
        for kind in CLIP_KINDS:
            if kind in encoders.kinds:
                provenance = encoders.provenance(kind)
                write_groups(cache, kind, provenance, CLIP_KINDS[kind].shape(provenance, bucket))
    write_groups(cache, "text", encoders.provenance("text"), prompt_shape(encoders))


def prompt_shape(encoders: Encoders) -> tuple[int, int]:
    """Shape of a row of prompt embeddings: (512, D)."""
    return MAX_TOKENS, int(encoders.provenance("text")["text_dim"])
