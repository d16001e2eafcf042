"""Sizes on disk: a cache before its clips are encoded, and the checkpoints of a run.

Owns: the only estimate of a cache's size. Must not know: manifests, stores, tokenizers.
"""

from collections.abc import Mapping
from math import prod

from wanlora.core.buckets import Bucket, latent_shape

STORED_SHARE_OF_TEXT = 0.62e6 / (130 * 4096 * 2)
"""Compressed over raw size of prompt embeddings. Measured: a clip of 81x480x832 and a caption of
130 tokens, 4,096 features wide, take 4.81 MB in the store, 4.19 MB of them latents, which lz4
does not make smaller (`python bench/store.py formats`, docs/benchmarks.md)."""

TOKENS_PER_CAPTION = 130
"""Tokens of an unknown caption; the number of the measurement above."""


def cache_bytes(
    clips: Mapping[Bucket, int],
    num_tokens: int,
    *,
    z_dim: int = 16,
    text_dim: int = 4096,
    item_bytes: int = 2,
    has_condition: bool = False,
    image_values: int = 0,
) -> int:
    """Estimate the size of a store: raw latents, and compressed prompt embeddings.

    Args:
        clips: Number of different clips, by bucket.
        num_tokens: Tokens of all different prompts; at most 512 of each are stored.
        z_dim: Channels of the latents.
        text_dim: Features of a token.
        item_bytes: Bytes of a value: 2 for float16, 4 for float32.
        has_condition: True for image to video: the latents of each clip's first frame followed by
            grey frames, which have the size of the clip's own.
        image_values: Values of each clip's embeddings by an image encoder.
    """
    latents = sum(number * prod(latent_shape(bucket, z_dim)) for bucket, number in clips.items())
    values = (1 + has_condition) * latents + image_values * sum(clips.values())
    return round(item_bytes * (values + STORED_SHARE_OF_TEXT * num_tokens * text_dim))


def checkpoint_bytes(num_trained: int, num_checkpoints: int) -> int:
    """Size of a run's checkpoints in fp32: masters and two moments, and the adapter at its root.

    Args:
        num_trained: Parameters of the adapter.
        num_checkpoints: Checkpoints that are kept.
    """
    return 4 * num_trained * (3 * num_checkpoints + 1)
