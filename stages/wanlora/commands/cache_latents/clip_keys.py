"""Keys of clips in the store: each clip's transform and the hash of its source.

Owns: hashing the sources of clips, and the clips that cannot be used. Must not know: the cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from wanlora.commands.cache_latents.hashes import Hashes
from wanlora.core.buckets import problem_with
from wanlora.data.clip import Clip, clip_key
from wanlora.data.clip_frames import load_clip
from wanlora.errors import MediaError
from wanlora.media.source import SourceHashes, hash_all, reading
from wanlora.progress import bar


@dataclass(frozen=True, slots=True)
class Failure:
    """A clip that cannot be used, and the reason; `code` as in `MediaError`."""

    code: str
    clip_id: str
    message: str


@dataclass(frozen=True, slots=True)
class KeyedClip:
    """A clip and its key in the store."""

    clip: Clip
    key: str


def failures_of(
    clips: Sequence[KeyedClip], failures_by_key: Mapping[str, Failure]
) -> list[Failure]:
    """Return a failure for each clip whose row could not be made."""
    return [
        replace(failures_by_key[keyed.key], clip_id=keyed.clip.clip_id)
        for keyed in clips
        if keyed.key in failures_by_key
    ]


@dataclass(slots=True)
class KeyedClips:
    """Clips with their keys.

    Attributes:
        num_bytes_hashed: Bytes of sources that were read to hash them.
        clips: Usable clips, in the given order.
        failures: Clips that cannot be used.
        unread: Clips whose sources cannot be read now but have a known hash.
        changed: Sources with another hash than the manifest has for them.
    """

    num_bytes_hashed: int
    clips: list[KeyedClip] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    unread: list[Failure] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)


def key_clips(clips: Sequence[Clip], hashes: Hashes, *, threads: int, shown: bool) -> KeyedClips:
    """Find the key of each usable clip; list the other clips, and the sources that have changed.

    Args:
        clips: Clips of the manifests.
        hashes: Known hashes; new ones are added.
        threads: Threads that hash.
        shown: True to show progress.
    """
    paths = dict.fromkeys(clip.path for clip in clips)
    remembered = dict(hashes.sources)
    with bar(total=len(paths), description="hash", unit="source", shown=shown) as progress:
        digests, num_bytes = hash_all(
            paths, hashes.sources, threads=threads, step=lambda: progress.update(1)
        )
    result = KeyedClips(num_bytes)
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
    """Hash of a source; if it cannot be read now, its hash from an earlier run, if there is one."""
    if isinstance(outcome, str):
        return outcome
    last = remembered.get(str(clip.path))
    return clip.source_sha256 if last is None else last[2]


def _check_size(clip: Clip) -> None:
    """Refuse a size that the VAE cannot take; a plain .npz line may have none (0x0x0).

    Raises:
        MediaError: The reason why the file cannot be used, or bad_size.
    """
    if problem := problem_with(clip.bucket):
        load_clip(clip)  # raises the reason if the file itself cannot be used
        raise MediaError("bad_size", f"{clip.path}: {problem}")
