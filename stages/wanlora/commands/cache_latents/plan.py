"""What there is to encode: clip and prompt keys, less the rows that are committed.

Owns: the way from manifests and a model folder to keys and provenances. Encodes nothing.
"""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wanlora.commands.cache_latents.hashes import Hashes, kept_digests
from wanlora.commands.cache_latents.turns import turn
from wanlora.config import CacheLatentsConfig
from wanlora.core import units
from wanlora.core.buckets import MAX_TOKENS, problem_with
from wanlora.core.fingerprint import difference, fingerprint
from wanlora.core.location import Location, Url
from wanlora.core.prompts import prompt_key
from wanlora.cost.sizes import cache_bytes
from wanlora.data.clip import TRANSFORM_REVISION, Clip, clip_key
from wanlora.data.clip_frames import load_clip
from wanlora.errors import DeviceError, MediaError, ModelError, StoreError
from wanlora.media.source import SourceHashes, hash_all, reading, source_sha256
from wanlora.progress import bar
from wanlora.store import index, storage
from wanlora.store.schema import Kind
from wanlora.wan import identity
from wanlora.wan.device import select_device
from wanlora.wan.model_folder import ENCODERS, find_downloaded, resolve
from wanlora.wan.provenance import (
    recorded_by_0_1_0,
    require_own_arithmetic,
    text_provenance,
    vae_provenance,
)
from wanlora.wan.tokens import estimate
from wanlora.wan.variants import VARIANTS, Variant, variant_of

ALIASES = "aliases.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Failure:
    """A clip that cannot be used, and why; `code` as in `MediaError`."""

    code: str
    clip_id: str
    message: str


@dataclass(frozen=True, slots=True)
class KeyedClip:
    """A clip and its key in the store."""

    clip: Clip
    key: str


@dataclass(frozen=True, slots=True)
class Encoders:
    """The model of a process that encodes, where it computes, and what its rows are filed under.

    Attributes:
        folder: Of the model's weights.
        variant: Which Wan model it is.
        device: Where to compute.
        latents_provenance: What decides the value of latents.
        text_provenance: What decides the value of prompt embeddings.
        stamps: Sizes and times of the files when they were hashed, by sub-folder.
    """

    folder: Path
    variant: Variant
    device: torch.device
    latents_provenance: Mapping[str, Any]
    text_provenance: Mapping[str, Any]
    stamps: Mapping[str, str] = field(default_factory=dict)

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


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that the manifests ask for, and what of it is not in the store yet.

    Attributes:
        clips: All usable clips, in the manifests' order.
        failures: Clips that cannot be used.
        unread: Clips whose sources cannot be read now but have a known hash; after `look` only
            those whose rows are committed.
        changed_sources: Source files that are not what they were when the manifest was written.
        num_bytes_hashed: Bytes of sources that were read to hash them.
        sources: Hashes of the sources by path, size and mtime; after `look` of missing clips only.
        prompts: Prompt key to text, of all captions and of the prompts training needs. The text is
            as given: cleaning is not idempotent, and the encoder cleans it once.
        captions: How many captions the clips have in all.
        missing_clips: To encode: one clip a key, those of one bucket together.
        missing_prompts: To encode: prompt key to text.
        using: What the rows are filed under; in this process or in its workers.
    """

    clips: tuple[KeyedClip, ...]
    failures: tuple[Failure, ...]
    unread: tuple[Failure, ...]
    changed_sources: tuple[str, ...]
    num_bytes_hashed: int
    sources: Mapping[str, tuple[int, int, str]]
    prompts: Mapping[str, str]
    captions: int
    missing_clips: tuple[KeyedClip, ...]
    missing_prompts: Mapping[str, str]
    using: Encoders

    @property
    def num_bytes(self) -> int:
        """Estimated size of what is missing."""
        latents = self.using.latents_provenance
        return cache_bytes(
            Counter(keyed.clip.bucket for keyed in self.missing_clips),
            sum(min(MAX_TOKENS, estimate(text)) for text in self.missing_prompts.values()),
            z_dim=int(latents["z_dim"]),
            text_dim=int(self.using.text_provenance["text_dim"]),
            item_bytes=np.dtype(latents["store_dtype"]).itemsize,
        )

    def fingerprint(self, kind: Kind) -> str:
        """What the rows of a kind are filed under."""
        return fingerprint(dict(_by_kind(self.using))[kind])

    @property
    def largest(self) -> int:
        """Bytes of the largest clip to encode, decoded."""
        return max((3 * prod(keyed.clip.bucket) for keyed in self.missing_clips), default=0)


def encoders_here(config: CacheLatentsConfig, hashes: Hashes, *, local_rank: int = 0) -> Encoders:
    """Find the device and the model of this process, and hash its weights.

    A dry run needs neither a GPU nor the weights of a model of the hub: it then plans for a GPU
    with TF32, and counts everything as missing in the cache.

    Raises:
        ConfigError: An environment variable changes the encoders' arithmetic.
        ModelError: There is no such model, or it is incomplete.
        DeviceError: The model is too large for what this machine has.
    """
    device = _device(config, local_rank)
    require_own_arithmetic(device)
    if config.dry_run and find_downloaded(config.model, ENCODERS) is None:
        return _not_downloaded(config, device)
    folder = resolve(config.model, ENCODERS)
    variant = variant_of(folder)
    with turn("hash"):  # the others find the digests of the first
        hashes.digests.update(kept_digests())
        stamps = {part: identity.stamp(folder / part) for part in ENCODERS}
        latents_provenance, text_provenance = _provenances(config, folder, device, hashes)
        hashes.keep_weights()
    return Encoders(folder, variant, device, latents_provenance, text_provenance, stamps)


def _device(config: CacheLatentsConfig, local_rank: int) -> torch.device:
    try:
        return select_device(config.device, config.model, local_rank=local_rank)
    except DeviceError as error:
        if not config.dry_run:
            raise
        log.info("the plan is for a GPU with TF32 (NVIDIA Ampere or newer); here: %s", error)
        return torch.device("cuda")


def _not_downloaded(config: CacheLatentsConfig, device: torch.device) -> Encoders:
    """Encoders of a hub model without its files: enough to count clips, prompts and bytes."""
    log.info(
        "%s is not on this machine, so the cache is not searched for its rows: all clips and "
        "prompts are counted as missing. The first run downloads the encoders", config.model,
    )  # fmt: skip
    variant = VARIANTS["t2v-1.3b"]  # all released T2V models have the same encoders
    latents = {
        "model": config.model,
        "store_dtype": config.store.dtype,
        "z_dim": variant.z_dim,
    }
    text = {"model": config.model, "text_dim": variant.text_dim}
    return Encoders(Path(config.model), variant, device, latents, text)


def make(
    config: CacheLatentsConfig,
    found: Sequence[Clip],
    *,
    using: Encoders,
    hashes: Hashes,
    shown: bool = True,
) -> Plan:
    """Hash the sources of the clips found; nothing is missing yet (`look`).

    Args:
        config: The settings.
        found: Clips of the manifests.
        using: What their rows will be filed under.
        hashes: Known ones; new ones are added.
        shown: Whether to show progress.

    Raises:
        StoreVersionError: The cache belongs to another release.
    """
    index.has_store(config.cache)
    keyed = _keyed(found, hashes, threads=config.decode_workers, shown=shown)
    wanted = [prompt for each in keyed.clips for prompt in each.clip.prompts]
    wanted += ["", using.variant.negative_prompt, *config.validation_prompts]
    prompts = {prompt_key(text): text for text in wanted}
    paths = {str(each.clip.path) for each in keyed.clips} & hashes.sources.keys()
    return Plan(
        clips=tuple(keyed.clips),
        failures=tuple(keyed.failures),
        unread=tuple(keyed.unread),
        changed_sources=tuple(sorted(keyed.changed)),
        num_bytes_hashed=keyed.num_bytes_hashed,
        sources={path: hashes.sources[path] for path in sorted(paths)},
        prompts=prompts,
        captions=sum(len(each.clip.prompts) for each in keyed.clips),
        missing_clips=(),
        missing_prompts={},
        using=using,
    )


def look(config: CacheLatentsConfig, plan: Plan) -> Plan:
    """Find the rows of a plan that are not committed.

    A run publishes what it wants before it looks, so that no collection takes what it found.

    Raises:
        StoreError: A commit record is damaged.
    """
    unread = {failure.clip_id for failure in plan.unread}
    # Of clips with equal pixels, one whose source can be read is encoded.
    last = sorted(plan.clips, key=lambda keyed: keyed.clip.clip_id not in unread)
    clips = {keyed.key: keyed for keyed in last}

    def missing(kind: Kind, keys: Iterable[str]) -> list[str]:
        return index.missing_keys(config.cache, kind, plan.fingerprint(kind), keys)

    missing_clips = [clips[key] for key in missing("latents", clips)]
    keys = {keyed.key for keyed in missing_clips}
    missing_ids = {keyed.clip.clip_id for keyed in plan.clips if keyed.key in keys}
    paths = {str(keyed.clip.path) for keyed in missing_clips}
    return replace(
        plan,
        unread=tuple(each for each in plan.unread if each.clip_id not in missing_ids),
        sources={path: entry for path, entry in plan.sources.items() if path in paths},
        missing_clips=tuple(sorted(missing_clips, key=lambda keyed: keyed.clip.bucket)),
        missing_prompts={key: plan.prompts[key] for key in missing("text", plan.prompts)},
    )


def _by_kind(using: Encoders) -> tuple[tuple[Kind, Mapping[str, Any]], ...]:
    return (("latents", using.latents_provenance), ("text", using.text_provenance))


def _provenances(
    config: CacheLatentsConfig, folder: Path, device: torch.device, hashes: Hashes
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    log.info("hashing the encoders in %s", folder)
    latents = vae_provenance(
        folder,
        dtype=getattr(torch, config.vae_dtype),
        tf32=has_tf32(device) and config.tf32,
        store_dtype=config.store.dtype,
        transform_revision=TRANSFORM_REVISION,
        mantissa_bits=config.store.latent_mantissa_bits,
        memo=hashes.digests,
    )
    text = text_provenance(
        folder,
        dtype=getattr(torch, config.text_dtype),
        store_dtype=config.store.dtype,
        memo=hashes.digests,
    )
    return (
        recorded(config, "latents", folder, latents, hashes),
        recorded(config, "text", folder, text, hashes),
    )


def recorded(
    config: CacheLatentsConfig,
    kind: Kind,
    folder: Path,
    provenance: Mapping[str, Any],
    hashes: Hashes,
) -> Mapping[str, Any]:
    """Return the provenance under which a cache has an encoder's rows: that of 0.1.0, or its own.

    An old one that was recognised by its files is remembered for the same encoder in other files.
    """
    stored = index.provenances(config.cache, kind)
    own = fingerprint(provenance)
    if own in stored:
        return provenance
    aliases = _parse_aliases(storage.at(config.cache).get(ALIASES))
    if aliases.get(own) in stored:
        return stored[aliases[own]]
    old = recorded_by_0_1_0(
        folder, provenance, stored.values(), lambda path: source_sha256(path, hashes.weights)
    )
    if old is None:
        return provenance
    log.info("this cache has %s of the same encoder, made by release 0.1.0; they are used", kind)
    if not config.dry_run:
        aliases[own] = fingerprint(old)
        storage.at(config.cache).put(
            ALIASES, json.dumps(aliases, sort_keys=True, indent=0).encode()
        )
    return old


def _parse_aliases(document: bytes | None) -> dict[str, str]:
    """Fingerprints of encoders to those that 0.1.0 gave them; a damaged document has none."""
    try:
        return {str(own): str(old) for own, old in json.loads(document or b"{}").items()}
    except (ValueError, AttributeError):
        return {}


def has_tf32(device: torch.device) -> bool:
    """Whether a device can round to TF32 at all (NVIDIA since Ampere, compute capability 8.0)."""
    if device.type != "cuda":
        return False
    # Without a GPU, a dry run plans for one.
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


@dataclass(slots=True)
class _Keyed:
    """Clips with their keys; the fields are those of `Plan`."""

    num_bytes_hashed: int
    clips: list[KeyedClip] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    unread: list[Failure] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)


def _keyed(
    clips: Sequence[Clip],
    hashes: Hashes,
    *,
    threads: int,
    shown: bool,
) -> _Keyed:
    """Give each usable clip its key; list the others, and the sources that have changed."""
    paths = dict.fromkeys(clip.path for clip in clips)
    remembered = dict(hashes.sources)
    with bar(total=len(paths), description="hash", unit="source", shown=shown) as progress:
        digests, num_bytes = hash_all(
            paths, hashes.sources, threads=threads, step=lambda: progress.update(1)
        )
    result = _Keyed(num_bytes)
    for clip in clips:
        try:
            with reading(clip.path):
                _check_size(clip)
        except MediaError as error:
            result.failures.append(Failure(error.code, clip.clip_id, str(error)))
            continue
        outcome = digests[clip.path]
        digest = _digest_of(outcome, clip, remembered)
        if digest is None:
            assert isinstance(outcome, MediaError)
            result.failures.append(Failure(outcome.code, clip.clip_id, str(outcome)))
            continue
        keyed = KeyedClip(replace(clip, source_sha256=digest), clip_key(clip, digest))
        result.clips.append(keyed)
        if clip.source_sha256 not in (None, digest):
            result.changed.add(clip.source)
        if isinstance(outcome, MediaError):
            result.unread.append(Failure(outcome.code, clip.clip_id, str(outcome)))
    return result


def _digest_of(outcome: str | MediaError, clip: Clip, remembered: SourceHashes) -> str | None:
    """Hash of a source; one that cannot be read now has that of the last time, if there is one."""
    if isinstance(outcome, str):
        return outcome
    last = remembered.get(str(clip.path))
    return clip.source_sha256 if last is None else last[2]


def _check_size(clip: Clip) -> None:
    """Refuse a size that the VAE cannot take; a plain .npz line may have none (0x0x0).

    Raises:
        MediaError: What is wrong with the file, or bad_size.
    """
    if problem := problem_with(clip.bucket):
        load_clip(clip)  # says what is wrong with the file itself, if anything is
        raise MediaError("bad_size", f"{clip.path}: {problem}")


def note_other_generations(cache: Location, using: Encoders) -> None:
    """Say how encodings of other weights or settings in this cache differ from this run's."""
    if not using.stamps:  # not downloaded
        return
    for kind, wanted in _by_kind(using):
        for other, provenance in index.provenances(cache, kind).items():
            if other != fingerprint(wanted):
                fields = "; ".join(difference(provenance, wanted))
                log.info("the cache also has %s of another encoder (%s)", kind, fields)


def check_disk(cache: Location, num_bytes: int) -> None:
    """Refuse to start what cannot be finished; an object store has no end that could be asked for.

    Raises:
        StoreError: The disk has less room than the encodings need.
    """
    if isinstance(cache, Url):
        return
    there = next(folder for folder in _upwards(cache) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise StoreError(
            f"{cache} needs about {units.size(num_bytes)} more, and its disk has "
            f"{units.size(free)} free; free some, or choose another folder with --cache"
        )


def _upwards(path: Path) -> Iterable[Path]:
    absolute = path.absolute()
    return (absolute, *absolute.parents)
