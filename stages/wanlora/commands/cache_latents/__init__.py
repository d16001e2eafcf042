"""Stage one: encode every clip and caption once, into the store."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from wanlora.commands.cache_latents import encode_settings, preflight
from wanlora.config import CacheLatentsConfig
from wanlora.core.kinds import Kind
from wanlora.core.location import Location

if TYPE_CHECKING:
    from wanlora.commands.cache_latents.clip_keys import Failure
    from wanlora.commands.cache_latents.preview_prompts import PromptsResult
    from wanlora.commands.cache_latents.summary import CacheResult
    from wanlora.store.views import View

__all__ = ["encode_rows", "run"]


def run(config: CacheLatentsConfig) -> "CacheResult | PromptsResult":
    """Encode the rows that the manifests need and the store lacks, and publish the view.

    With `preview_prompts`, only these are encoded, and no view is published.

    Raises:
        WanloraError: See `preflight.check` and `cache_latents.run`.
        KeyboardInterrupt: SIGINT or SIGTERM; encoded rows are kept.
    """
    if config.preview_prompts:
        view = preflight.check_view(config)
        from wanlora.commands.cache_latents import preview_prompts  # noqa: PLC0415  (imports torch)

        settings = encode_settings.of_config(config)
        if "model" not in config.model_fields_set:
            settings = replace(settings, model=view.model)
        return preview_prompts.encode_preview_prompts(config.preview_prompts, view, settings)
    clips, bad_lines = preflight.check(config)
    from wanlora.commands.cache_latents import cache_latents  # noqa: PLC0415  (imports torch and diffusers)

    return cache_latents.run(config, clips, bad_lines)


def encode_rows(
    view: "View",
    *,
    missing: Mapping[Kind, Collection[str]],
    cache: Location,
    manifests: Sequence[Path],
    source_root: Sequence[Path],
    device: str,
    rows_per_segment: int,
    segment_bytes: int,
) -> "tuple[int, list[Failure]]":
    """Encode rows of a view again that the store has lost, with the view's encoders and types.

    Args:
        view: The view; it stays as it is.
        missing: Keys of the rows to encode, by kind.
        cache: Cache folder or URL.
        manifests: Paths of the manifests that the view was made from.
        source_root: Folders to search for sources that were moved.
        device: Name of the device.
        rows_per_segment: Maximum number of rows in a segment.
        segment_bytes: Maximum raw bytes in a segment.

    Returns:
        Number of rows encoded, and the clips that could not be encoded.

    Raises:
        StoreError: The manifests, the model or the device give none of these rows.
        WanloraError: The encoders cannot be used.
    """
    from wanlora.commands.cache_latents import lost_rows  # noqa: PLC0415  (imports torch and diffusers)

    settings = encode_settings.of_view(
        view,
        cache=cache,
        device=device,
        rows_per_segment=rows_per_segment,
        segment_bytes=segment_bytes,
    )
    return lost_rows.encode_rows(
        view, settings, manifests=manifests, source_root=source_root, missing=missing
    )
