"""Stage one: encode every clip and caption once, into the store."""

from collections.abc import Collection
from typing import TYPE_CHECKING

from wanlora.commands.cache_latents import preflight
from wanlora.config import CacheLatentsConfig

if TYPE_CHECKING:
    from wanlora.commands.cache_latents.plan import Failure
    from wanlora.commands.cache_latents.preview_prompts import PromptsResult
    from wanlora.commands.cache_latents.summary import CacheResult
    from wanlora.store.views import View

__all__ = ["encode_rows", "run"]


def run(config: CacheLatentsConfig) -> "CacheResult | PromptsResult":
    """Encode what the manifests name and the store lacks, and publish the view.

    With `preview_prompts`, only these are encoded, and no view is published.

    Raises:
        WanloraError: See `preflight.check` and `stage.run`.
        KeyboardInterrupt: SIGINT or SIGTERM; encoded rows are kept.
    """
    if config.preview_prompts:
        view = preflight.check_view(config)
        from wanlora.commands.cache_latents import preview_prompts  # noqa: PLC0415  (imports torch)

        return preview_prompts.encode_preview_prompts(config, view)
    found, bad = preflight.check(config)
    from wanlora.commands.cache_latents import cache_latents  # noqa: PLC0415  (imports torch and diffusers)

    return cache_latents.run(config, found, bad)


def encode_rows(
    config: CacheLatentsConfig, view: "View", *, clips: Collection[str], prompts: Collection[str]
) -> "tuple[int, list[Failure]]":
    """Encode again what the store has lost of a view; see `stage.encode_rows`."""
    from wanlora.commands.cache_latents import cache_latents  # noqa: PLC0415  (imports torch and diffusers)

    return cache_latents.encode_rows(config, view, clips=clips, prompts=prompts)
