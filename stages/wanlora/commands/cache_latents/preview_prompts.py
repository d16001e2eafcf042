"""`wanlora cache-latents --preview-prompt`: embeddings of single prompts, for previews of training.

Owns: the prompts that `train --preview-prompt` needs. They are rows of the cache like any other
prompt, under the encoder of its view; no view changes, and no manifest is read. A cache that cannot
be written keeps its own, and the rows go into the user's cache folder.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wanlora.commands.cache_latents import plan as planning
from wanlora.commands.cache_latents.encode import EncodedPrompts, encode_prompts
from wanlora.commands.cache_latents.hashes import Hashes, kept_digests
from wanlora.commands.cache_latents.plan import Encoders
from wanlora.commands.cache_latents.turns import turn
from wanlora.commands.cache_latents.worker import shown_progress
from wanlora.config import CacheLatentsConfig
from wanlora.core.fingerprint import difference, fingerprint
from wanlora.core.location import Location, prompt_home
from wanlora.core.prompts import prompt_key
from wanlora.errors import OutputError, StaleStoreError, StoreError
from wanlora.store import index, storage
from wanlora.store.views import View
from wanlora.wan import identity
from wanlora.wan.device import select_device
from wanlora.wan.model_folder import TEXT_ENCODER, resolve
from wanlora.wan.provenance import require_own_arithmetic, text_provenance
from wanlora.wan.variants import VARIANTS

PROBE = "writable"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptsResult:
    """Result of encoding single prompts.

    Attributes:
        kept_in: Cache that has the new rows: the one given, or the user's cache folder.
        prompts_encoded: Prompts encoded by this run.
        prompts_cached: Prompts that were there before.
        truncated_prompts: Prompts that lost their end: over 512 tokens.
    """

    cache: str
    view: str
    kept_in: str
    prompts_encoded: int
    prompts_cached: int
    seconds: float
    truncated_prompts: list[str] = field(default_factory=list)
    exit_code: int = 0

    def lines(self) -> list[str]:
        """Format the result."""
        return [
            f"prompts: {self.prompts_encoded} encoded in {self.seconds:.1f} s into {self.kept_in}, "
            f"{self.prompts_cached} already there"
        ]


def encode_preview_prompts(config: CacheLatentsConfig, view: View) -> PromptsResult:
    """Encode the prompts that neither the cache nor the user's cache folder has.

    Args:
        config: Its `preview_prompts`, cache, view and device. The model is the view's unless one is
            given; types are the view's.
        view: The view, from `preflight.check_view`.

    Raises:
        StaleStoreError: The model's text encoder is not the one that encoded the view.
        ModelError: The text encoder is not on this machine, or is damaged.
        DeviceError: The text encoder does not fit into the device.
    """
    started = time.monotonic()
    texts = {prompt_key(text): text for text in config.preview_prompts}
    missing = missing_prompts(config.cache, view.text, texts)
    kept_in, made = config.cache, EncodedPrompts()
    if missing:
        config = _as_the_view(config, view)
        using = _text_encoder(config, view)
        if not _is_writable(config.cache):
            kept_in = prompt_home()
            log.warning(
                "%s cannot be written: the embeddings are kept in %s, for this user of this "
                "machine", config.cache, kept_in,
            )  # fmt: skip
        into = config.model_copy(update={"cache": kept_in})
        with shown_progress(len(missing), "prompts", "prompt", shown=True) as progress:
            made = encode_prompts(into, using, [missing], progress)
    for text in made.truncated:
        log.warning("a prompt has more than 512 tokens, and its end is not used: %s", text)
    return PromptsResult(
        cache=str(config.cache),
        view=config.view,
        kept_in=str(kept_in),
        prompts_encoded=made.rows,
        prompts_cached=len(texts) - made.rows,
        seconds=time.monotonic() - started,
        truncated_prompts=list(made.truncated),
    )


def missing_prompts(cache: Location, text: str, texts: Mapping[str, str]) -> dict[str, str]:
    """Prompts, by key, that neither a cache nor the user's cache folder has.

    Args:
        cache: Cache folder or URL.
        text: Whole fingerprint of the text encoder.
        texts: Prompts by key.
    """
    left: Sequence[str] = list(texts)
    for place in (cache, prompt_home()):
        left = index.missing_keys(place, "text", text, left)
    return {key: texts[key] for key in left}


def _as_the_view(config: CacheLatentsConfig, view: View) -> CacheLatentsConfig:
    """Settings that give the rows of a view's encoder."""
    recorded = view.text_provenance
    store = config.store.model_copy(update={"dtype": recorded["store_dtype"]})
    update: dict[str, Any] = {"store": store, "text_dtype": recorded["compute_dtype"]}
    if "model" not in config.model_fields_set:
        update["model"] = view.model
    return config.model_copy(update=update)


def _text_encoder(config: CacheLatentsConfig, view: View) -> Encoders:
    """Find the text encoder on this machine, and compare it with the view's."""
    device = select_device(config.device, config.model)
    require_own_arithmetic(device)
    folder = resolve(config.model, TEXT_ENCODER)
    hashes = Hashes.read(config.cache)
    with turn("hash"):
        hashes.digests.update(kept_digests())
        stamps = {part: identity.stamp(folder / part) for part in TEXT_ENCODER}
        log.info("hashing the text encoder in %s", folder)
        found: Mapping[str, Any] = text_provenance(
            folder,
            dtype=getattr(torch, config.text_dtype),
            store_dtype=config.store.dtype,
            memo=hashes.digests,
        )
        found = planning.recorded(config, "text", folder, found, hashes)
        hashes.keep_weights()
    if fingerprint(found) != view.text:
        raise StaleStoreError(
            f"view {view.name!r} of {config.cache} was encoded with another text encoder than that "
            f"of {config.model}:\n  "
            + "\n  ".join(difference(found, view.text_provenance))
            + f"\npass the model that it was encoded with, {view.model}: --model"
        )
    variant = VARIANTS[view.variant]
    return Encoders(folder, variant, device, view.latents_provenance, found, stamps)


def _is_writable(cache: Location) -> bool:
    """Return whether an object can be written into a cache, by writing one."""
    if isinstance(cache, Path) and not cache.is_dir():
        return False
    try:
        storage.at(cache).put(PROBE, b"")
        storage.at(cache).remove(PROBE)
    except (StoreError, OutputError):
        return False
    return True
