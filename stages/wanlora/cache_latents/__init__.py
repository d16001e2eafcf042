"""Stage one: encode every clip and caption once, into the store.

preflight.py  checks that need no torch
stage.py      the order of things, and the view; encode_rows() for what a view has lost
result.py     what the command prints and returns
plan.py       what there is to encode: hashes, keys, provenances, sizes
hashes.py     hashes of sources and encoders that earlier runs computed
turns.py      a lock, so that processes of one machine load UMT5 one after the other
worker.py     what one worker does, whoever started it
claims.py     the rows that a rank takes next: rows that are not committed
preview_prompts.py  embeddings of single prompts, for previews of training
processes.py  workers on this machine, a process each
on_ray.py     workers on a cluster: actors, and tasks that decode for them
pipeline.py   threads that decode ahead of the encoder and write behind it
encode.py     the two encoders at work, and the check that they are the right ones
decode.py     a clip to frames, or to what is wrong with it
"""

from collections.abc import Collection
from typing import TYPE_CHECKING

from wanlora.cache_latents import preflight
from wanlora.config import CacheLatentsConfig

if TYPE_CHECKING:
    from wanlora.cache_latents.plan import Failure
    from wanlora.cache_latents.preview_prompts import PromptsResult
    from wanlora.cache_latents.result import CacheResult
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
        from wanlora.cache_latents import preview_prompts  # noqa: PLC0415  (imports torch)

        return preview_prompts.encode_preview_prompts(config, view)
    found, bad = preflight.check(config)
    from wanlora.cache_latents import stage  # noqa: PLC0415  (imports torch and diffusers)

    return stage.run(config, found, bad)


def encode_rows(
    config: CacheLatentsConfig, view: "View", *, clips: Collection[str], prompts: Collection[str]
) -> "tuple[int, list[Failure]]":
    """Encode again what the store has lost of a view; see `stage.encode_rows`."""
    from wanlora.cache_latents import stage  # noqa: PLC0415  (imports torch and diffusers)

    return stage.encode_rows(config, view, clips=clips, prompts=prompts)
