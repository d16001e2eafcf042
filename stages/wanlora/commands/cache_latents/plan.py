"""Rows that the manifests need, and those of them that the store lacks.

Owns: the search for missing rows of clips and captions. Encodes nothing.
"""

import shutil
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from wanlora.commands.cache_latents.clip_keys import Failure, KeyedClip, key_clips
from wanlora.commands.cache_latents.clip_kinds import CLIP_KINDS
from wanlora.commands.cache_latents.find_encoders import Encoders
from wanlora.commands.cache_latents.hashes import Hashes
from wanlora.core import units
from wanlora.core.buckets import MAX_TOKENS
from wanlora.core.kinds import Kind
from wanlora.core.location import Location, Url
from wanlora.core.prompts import prompt_key
from wanlora.cost.sizes import cache_bytes
from wanlora.data.clip import Clip
from wanlora.errors import StoreError
from wanlora.store import index
from wanlora.wan.tokens import estimate


@dataclass(frozen=True, slots=True)
class Plan:
    """Rows that the manifests need, and those that are not in the store yet.

    Attributes:
        clips: All usable clips, in the manifests' order.
        failures: Clips that cannot be used.
        unread: Clips whose sources cannot be read now but have a known hash; after `find_missing`
            only those whose rows are committed.
        changed_sources: Source files that have changed since the manifest was written.
        num_bytes_hashed: Bytes of sources that were read to hash them.
        sources: Hashes of the sources by path, size and mtime; after `find_missing` only those of
            missing clips.
        prompts: Prompt key to text, of all captions and of the prompts training needs. The text is
            as given: cleaning is not idempotent, and the encoder cleans it once.
        captions: Number of captions of all clips.
        missing_clips: Clips to encode, for each kind of row of clips that the model needs: one per
            key, sorted by bucket.
        missing_prompts: Prompts to encode: prompt key to text.
        encoders: Encoders of the rows, in this process or in its workers.
    """

    clips: tuple[KeyedClip, ...]
    failures: tuple[Failure, ...]
    unread: tuple[Failure, ...]
    changed_sources: tuple[str, ...]
    num_bytes_hashed: int
    sources: Mapping[str, tuple[int, int, str]]
    prompts: Mapping[str, str]
    captions: int
    missing_clips: Mapping[Kind, tuple[KeyedClip, ...]]
    missing_prompts: Mapping[str, str]
    encoders: Encoders

    @property
    def bytes_by_kind(self) -> dict[Kind, int]:
        """Estimated size of the missing rows of each kind."""
        of_text = self.encoders.provenance("text")
        tokens = sum(min(MAX_TOKENS, estimate(text)) for text in self.missing_prompts.values())
        item_bytes = np.dtype(self.encoders.provenance("latents")["store_dtype"]).itemsize
        found: dict[Kind, int] = {
            "text": cache_bytes(
                {}, tokens, text_dim=int(of_text["text_dim"]), item_bytes=item_bytes
            )
        }
        for kind, clips in self.missing_clips.items():
            shape, provenance = CLIP_KINDS[kind].shape, self.encoders.provenance(kind)
            values = (prod(shape(provenance, keyed.clip.bucket)) for keyed in clips)
            found[kind] = item_bytes * sum(values)
        return found

    @property
    def num_bytes(self) -> int:
        """Estimated size of the missing rows."""
        return sum(self.bytes_by_kind.values())

    @property
    def missing_keys(self) -> dict[Kind, set[str]]:
        """Keys of the missing rows, by kind."""
        found: dict[Kind, set[str]] = {"text": set(self.missing_prompts)}
        found |= {kind: {k.key for k in clips} for kind, clips in self.missing_clips.items()}
        return {kind: found[kind] for kind in self.encoders.kinds if kind in found}

    def only(self, keys: Mapping[Kind, Container[str]]) -> "Plan":
        """The plan with only these missing rows."""
        prompts = keys.get("text", ())
        return replace(
            self,
            missing_prompts={k: text for k, text in self.missing_prompts.items() if k in prompts},
            missing_clips={
                kind: tuple(keyed for keyed in clips if keyed.key in keys.get(kind, ()))
                for kind, clips in self.missing_clips.items()
            },
        )

    def largest_clip_bytes(self, kind: Kind) -> int:
        """Bytes of the decoded frames of the largest clip to encode for a kind of row."""
        sizes = (CLIP_KINDS[kind].frames_bytes(k.clip.bucket) for k in self.missing_clips[kind])
        return max(sizes, default=0)


def make_plan(
    clips: Sequence[Clip],
    *,
    cache: Location,
    encoders: Encoders,
    hashes: Hashes,
    more_prompts: Iterable[str] = (),
    threads: int,
    shown: bool = True,
) -> Plan:
    """Hash the sources of the clips; no row is missing yet (see `find_missing`).

    Args:
        clips: Clips of the manifests.
        cache: Cache folder or URL.
        encoders: Encoders of the rows.
        hashes: Known hashes; new ones are added.
        more_prompts: Prompts to encode besides the captions.
        threads: Threads that hash.
        shown: True to show progress.

    Raises:
        StoreVersionError: The cache belongs to another release.
    """
    index.has_store(cache)
    keyed = key_clips(clips, hashes, threads=threads, shown=shown)
    wanted = [prompt for each in keyed.clips for prompt in each.clip.prompts]
    wanted += ["", encoders.variant.defaults.negative_prompt, *more_prompts]
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
        missing_clips={},
        missing_prompts={},
        encoders=encoders,
    )


def find_missing(cache: Location, plan: Plan) -> Plan:
    """Find the rows of a plan that are not committed.

    A run publishes the rows that it wants first, so that no garbage collection deletes rows that
    are found here.

    Raises:
        StoreError: A commit record is damaged.
    """
    unread = {failure.clip_id for failure in plan.unread}
    # Of clips with equal pixels, one whose source can be read is encoded.
    last = sorted(plan.clips, key=lambda keyed: keyed.clip.clip_id not in unread)
    clips = {keyed.key: keyed for keyed in last}

    def missing(kind: Kind, keys: Iterable[str]) -> list[str]:
        return index.missing_keys(cache, kind, plan.encoders.fingerprint(kind), keys)

    missing_clips = {
        kind: tuple(
            sorted((clips[key] for key in missing(kind, clips)), key=lambda k: k.clip.bucket)
        )
        for kind in CLIP_KINDS
        if kind in plan.encoders.kinds
    }
    lacking = [keyed for each in missing_clips.values() for keyed in each]
    keys = {keyed.key for keyed in lacking}
    missing_ids = {keyed.clip.clip_id for keyed in plan.clips if keyed.key in keys}
    paths = {str(keyed.clip.path) for keyed in lacking}
    return replace(
        plan,
        unread=tuple(each for each in plan.unread if each.clip_id not in missing_ids),
        sources={path: entry for path, entry in plan.sources.items() if path in paths},
        missing_clips=missing_clips,
        missing_prompts={key: plan.prompts[key] for key in missing("text", plan.prompts)},
    )


def check_disk(cache: Location, num_bytes: int) -> None:
    """Refuse to start if the disk is too small; the size of an object store is not known.

    Raises:
        StoreError: The disk has less room than the rows need.
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
