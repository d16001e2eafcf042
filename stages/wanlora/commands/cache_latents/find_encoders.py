"""The encoders of a process: folder, device, and the provenances that its rows are stored under.

Owns: finding and hashing the model, and the use of rows that release 0.1.0 made with the same
encoder. Loads no weights into a model.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from wanlora.commands.cache_latents.encode_settings import EncodeSettings
from wanlora.commands.cache_latents.hashes import Hashes, kept_digests
from wanlora.core.fingerprint import difference, fingerprint
from wanlora.core.kinds import Kind
from wanlora.core.location import Location
from wanlora.data.clip import TRANSFORM_REVISION
from wanlora.errors import DeviceError, ModelError
from wanlora.media.source import source_sha256
from wanlora.processes.turns import turn
from wanlora.progress import waiting
from wanlora.store import index, storage
from wanlora.wan import identity
from wanlora.wan.device import select_device
from wanlora.wan.model_folder import (
    ENCODERS,
    encoders_of,
    find_downloaded,
    resolve,
    resolve_configs,
)
from wanlora.wan.provenance import (
    clip_vision_provenance,
    condition_provenance,
    recorded_by_0_1_0,
    require_own_arithmetic,
    text_provenance,
    vae_provenance,
)
from wanlora.wan.variants import VARIANTS, Variant, variant_of

ALIASES = "aliases.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Encoders:
    """The model of a process that encodes, its device, and the provenances of its rows.

    Attributes:
        folder: Folder with the model's weights.
        variant: Variant of the model.
        device: Device to compute on.
        provenances: Everything that decides the value of a row, for each kind that the variant
            needs.
        stamps: Sizes and times of the files when they were hashed, by sub-folder.
    """

    folder: Path
    variant: Variant
    device: torch.device
    provenances: Mapping[Kind, Mapping[str, Any]]
    stamps: Mapping[str, str] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kinds of rows that the variant needs."""
        return tuple(self.provenances)

    def fingerprint(self, kind: Kind) -> str:
        """Fingerprint that the rows of a kind are stored under."""
        return fingerprint(self.provenances[kind])

    def provenance(self, kind: Kind) -> Mapping[str, Any]:
        """Everything that decides the value of a kind's rows."""
        return self.provenances[kind]

    def require_unchanged(self, part: str) -> None:
        """Refuse weights that were loaded from other files than those that were hashed.

        Raises:
            ModelError: A file of the sub-folder has another size or time.
        """
        if part in self.stamps and identity.stamp(self.folder / part) != self.stamps[part]:
            raise ModelError(
                f"{self.folder / part} was changed between hashing and loading; run the same "
                "command again when the folder is complete"
            )


def find_encoders(
    settings: EncodeSettings, hashes: Hashes, *, local_rank: int = 0, dry_run: bool = False
) -> Encoders:
    """Find the device and the model of this process, and hash its weights.

    A dry run needs neither a GPU nor the weights of a model of the hub: it then plans for a GPU
    with TF32, and counts all rows as missing in the cache.

    Args:
        settings: Names of the model and the device, and the types.
        hashes: Known hashes; new ones are added.
        local_rank: Index among the processes of this machine.
        dry_run: True if nothing will be encoded or written.

    Raises:
        ConfigError: An environment variable changes the encoders' arithmetic.
        ModelError: There is no such model, or it is incomplete.
        DeviceError: The model is too large for the memory of this machine.
    """
    device = _device(settings, local_rank, dry_run=dry_run)
    require_own_arithmetic(device)
    if dry_run and find_downloaded(settings.model, ENCODERS) is None:
        return _not_downloaded(settings, device)
    variant = variant_of(resolve(settings.model, ENCODERS))
    parts = encoders_of(variant.kinds)
    if dry_run and find_downloaded(settings.model, parts) is None:
        return _not_downloaded(settings, device)
    folder = resolve(settings.model, parts)
    with turn("hash"):  # the first process computes the digests, the others read them
        hashes.digests.update(kept_digests())
        stamps = {part: identity.stamp(folder / part) for part in parts}
        with waiting(f"hashing the encoders in {folder}"):
            vae = _hash_vae(settings, folder, device, hashes)
            own = {
                kind: _provenance_of(kind, vae, settings, folder, hashes) for kind in variant.kinds
            }
        provenances = {
            kind: as_recorded(settings.cache, kind, folder, each, hashes, dry_run=dry_run)
            for kind, each in own.items()
        }
        hashes.keep_weights()
    return Encoders(folder, variant, device, provenances, stamps)


def _device(settings: EncodeSettings, local_rank: int, *, dry_run: bool) -> torch.device:
    try:
        return select_device(settings.device, settings.model, local_rank=local_rank)
    except DeviceError as error:
        if not dry_run:
            raise
        log.info("the plan is for a GPU with TF32 (NVIDIA Ampere or newer); here: %s", error)
        return torch.device("cuda")


def _not_downloaded(settings: EncodeSettings, device: torch.device) -> Encoders:
    """Encoders of a hub model without its files: enough to count clips, prompts and bytes."""
    log.info(
        "the encoders of %s are not on this machine, so the cache is not searched for its rows: "
        "all rows are counted as missing. The first run downloads the encoders", settings.model,
    )  # fmt: skip
    try:
        variant = variant_of(resolve_configs(settings.model, ENCODERS))
    except ModelError:
        log.info("its configuration is not here either: planned as a text-to-video model of Wan")
        variant = VARIANTS["t2v-1.3b"]  # all released ones have the same encoders
    facts = {
        "model": settings.model,
        "store_dtype": settings.store_dtype,
        "z_dim": variant.vae.z_dim,
        "text_dim": variant.shape.text_dim,
        "num_tokens": variant.shape.num_image_tokens,
        "image_dim": variant.shape.image_dim,
    }
    provenances = {kind: {"kind": kind, **facts} for kind in variant.kinds}
    return Encoders(Path(settings.model), variant, device, provenances)


def _hash_vae(
    settings: EncodeSettings, folder: Path, device: torch.device, hashes: Hashes
) -> Mapping[str, Any]:
    return vae_provenance(
        folder,
        dtype=getattr(torch, settings.vae_dtype),
        tf32=has_tf32(device) and settings.tf32,
        store_dtype=settings.store_dtype,
        transform_revision=TRANSFORM_REVISION,
        mantissa_bits=settings.mantissa_bits,
        memo=hashes.digests,
    )


def _provenance_of(
    kind: Kind,
    vae: Mapping[str, Any],
    settings: EncodeSettings,
    folder: Path,
    hashes: Hashes,
) -> Mapping[str, Any]:
    """Describe everything that decides the value of a kind's rows; `vae` is that of latents."""
    if kind == "latents":
        return vae
    if kind == "cond_latents":
        return condition_provenance(vae)
    if kind == "text":
        return hash_text_encoder(settings, folder, hashes)
    return clip_vision_provenance(
        folder,
        store_dtype=settings.store_dtype,
        transform_revision=TRANSFORM_REVISION,
        memo=hashes.digests,
    )


def hash_text_encoder(settings: EncodeSettings, folder: Path, hashes: Hashes) -> Mapping[str, Any]:
    """Describe everything that decides the value of prompt embeddings.

    Raises:
        ModelError: Files of the text encoder or the tokenizer are missing or damaged.
    """
    return text_provenance(
        folder,
        dtype=getattr(torch, settings.text_dtype),
        store_dtype=settings.store_dtype,
        memo=hashes.digests,
    )


def as_recorded(
    cache: Location,
    kind: Kind,
    folder: Path,
    provenance: Mapping[str, Any],
    hashes: Hashes,
    *,
    dry_run: bool = False,
) -> Mapping[str, Any]:
    """Return the provenance under which a cache has an encoder's rows: that of 0.1.0, or its own.

    If an old provenance is recognised by its files, it is recorded for the same encoder in other
    files, except in a dry run.
    """
    stored = index.provenances(cache, kind)
    own = fingerprint(provenance)
    if own in stored:
        return provenance
    aliases = _parse_aliases(storage.at(cache).get(ALIASES))
    if aliases.get(own) in stored:
        return stored[aliases[own]]
    old = recorded_by_0_1_0(
        folder, provenance, stored.values(), lambda path: source_sha256(path, hashes.weights)
    )
    if old is None:
        return provenance
    log.info("this cache has %s of the same encoder, made by release 0.1.0; they are used", kind)
    if not dry_run:
        aliases[own] = fingerprint(old)
        storage.at(cache).put(ALIASES, json.dumps(aliases, sort_keys=True, indent=0).encode())
    return old


def _parse_aliases(document: bytes | None) -> dict[str, str]:
    """Fingerprints of 0.1.0, by the present fingerprint; empty for a damaged document."""
    try:
        return {str(own): str(old) for own, old in json.loads(document or b"{}").items()}
    except (ValueError, AttributeError):
        return {}


def has_tf32(device: torch.device) -> bool:
    """Return whether a device supports TF32 (NVIDIA since Ampere, compute capability 8.0)."""
    if device.type != "cuda":
        return False
    # Without a GPU, a dry run plans for one.
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def log_other_generations(cache: Location, encoders: Encoders) -> None:
    """Log how the rows of other weights or settings in a cache differ from this run's."""
    if not encoders.stamps:  # not downloaded
        return
    for kind, wanted in encoders.provenances.items():
        for other, provenance in index.provenances(cache, kind).items():
            if other != fingerprint(wanted):
                fields = "; ".join(difference(provenance, wanted))
                log.info("the cache also has %s of another encoder (%s)", kind, fields)
