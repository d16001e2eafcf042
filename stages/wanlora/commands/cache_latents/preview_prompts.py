"""`wanlora cache-latents --preview-prompt`: embeddings of single prompts, for previews of training.

Owns: the prompts that `train --preview-prompt` needs. They are ordinary rows of the
cache, under the encoder of its view. No view changes, and no manifest is read. If the cache
cannot be written, the rows go into the user's cache folder.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from wanlora.commands.cache_latents.encode_prompts import EncodedPrompts, encode_prompts
from wanlora.commands.cache_latents.encode_settings import EncodeSettings
from wanlora.commands.cache_latents.find_encoders import (
    Encoders,
    as_recorded,
    hash_text_encoder,
)
from wanlora.commands.cache_latents.hashes import Hashes, kept_digests
from wanlora.commands.cache_latents.worker import shown_progress
from wanlora.core.fingerprint import difference, fingerprint
from wanlora.core.location import Location, prompt_home
from wanlora.core.prompts import prompt_key
from wanlora.errors import OutputError, StaleStoreError, StoreError
from wanlora.processes.turns import turn
from wanlora.store import index, storage
from wanlora.store.views import View
from wanlora.wan import identity
from wanlora.wan.device import select_device
from wanlora.wan.model_folder import TEXT_ENCODER, resolve
from wanlora.wan.provenance import require_own_arithmetic
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
        truncated_prompts: Prompts that were cut because they have over 512 tokens.
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


def encode_preview_prompts(
    prompts: Sequence[str], view: View, settings: EncodeSettings
) -> PromptsResult:
    """Encode the prompts that neither the cache nor the user's cache folder has.

    Args:
        prompts: The prompts.
        view: The view, from `preflight.check_view`.
        settings: The cache, the model and the device; types are the view's.

    Raises:
        StaleStoreError: The model's text encoder is not the one that encoded the view.
        ModelError: The text encoder is not on this machine, or is damaged.
        DeviceError: The text encoder does not fit into the device.
    """
    started = time.monotonic()
    cache = settings.cache
    texts = {prompt_key(text): text for text in prompts}
    missing = missing_prompts(cache, view.fingerprint("text"), texts)
    kept_in, encoded = cache, EncodedPrompts()
    if missing:
        recorded = view.provenance("text")
        settings = replace(
            settings, text_dtype=recorded["compute_dtype"], store_dtype=recorded["store_dtype"]
        )
        encoders = _find_text_encoder(settings, view)
        if not _is_writable(cache):
            kept_in = prompt_home()
            log.warning(
                "%s cannot be written: the embeddings are kept in %s, for this user of this "
                "machine", cache, kept_in,
            )  # fmt: skip
        into = replace(settings, cache=kept_in)
        with shown_progress(len(missing), "prompts", "prompt", shown=True) as progress:
            encoded = encode_prompts(into, encoders, [missing], progress)
    for text in encoded.truncated:
        log.warning("a prompt has more than 512 tokens, and its end is not used: %s", text)
    return PromptsResult(
        cache=str(cache),
        view=view.name,
        kept_in=str(kept_in),
        prompts_encoded=encoded.rows,
        prompts_cached=len(texts) - encoded.rows,
        seconds=time.monotonic() - started,
        truncated_prompts=list(encoded.truncated),
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


def _find_text_encoder(settings: EncodeSettings, view: View) -> Encoders:
    """Find the text encoder on this machine, and compare it with the view's."""
    device = select_device(settings.device, settings.model)
    require_own_arithmetic(device)
    folder = resolve(settings.model, TEXT_ENCODER)
    hashes = Hashes.read(settings.cache)
    with turn("hash"):
        hashes.digests.update(kept_digests())
        stamps = {part: identity.stamp(folder / part) for part in TEXT_ENCODER}
        log.info("hashing the text encoder in %s", folder)
        found = hash_text_encoder(settings, folder, hashes)
        found = as_recorded(settings.cache, "text", folder, found, hashes)
        hashes.keep_weights()
    if fingerprint(found) != view.fingerprint("text"):
        raise StaleStoreError(
            f"view {view.name!r} of {settings.cache} was encoded with another text encoder than "
            f"that of {settings.model}:\n  "
            + "\n  ".join(difference(found, view.provenance("text")))
            + f"\npass the model that it was encoded with, {view.model}: --model"
        )
    variant = VARIANTS[view.variant]
    return Encoders(folder, variant, device, {"text": found}, stamps)


def _is_writable(cache: Location) -> bool:
    """Return whether a cache is writable; writes an object."""
    if isinstance(cache, Path) and not cache.is_dir():
        return False
    try:
        storage.at(cache).put(PROBE, b"")
        storage.at(cache).remove(PROBE)
    except (StoreError, OutputError):
        return False
    return True
