"""Sources of clips: finding those that were moved, and the refusals if they are missing.

Owns: the cases in which a run continues without some sources, and the advice to find them.
"""

import logging
import shlex
import socket
from collections.abc import Sequence
from pathlib import Path

from wanlora.commands.cache_latents.clip_keys import Failure
from wanlora.commands.cache_latents.hashes import Hashes
from wanlora.commands.cache_latents.plan import Plan
from wanlora.commands.cache_latents.summary import listed
from wanlora.core.location import Location
from wanlora.data.clip import Clip
from wanlora.data.source_root import advice, find_sources
from wanlora.errors import ManifestError
from wanlora.processes.ranks import Rank

log = logging.getLogger(__name__)


def find_moved_sources(
    clips: Sequence[Clip], *, cache: Location, manifests: Sequence[Path], roots: Sequence[Path]
) -> tuple[list[Clip], Hashes]:
    """Find sources that were moved, and read the known hashes of all sources.

    Args:
        clips: Clips of the manifests.
        cache: Cache folder or URL, which has hashes of earlier runs.
        manifests: Paths of the manifests; `prepare` writes hashes beside them.
        roots: Folders given with --source-root.
    """
    hashes = Hashes.read(cache, manifests)
    found, moved = find_sources(clips, roots)
    hashes.move_sources(moved)
    return found, hashes


def require_usable_clips(
    clips: Sequence[Clip], plan: Plan, manifests: Sequence[Path], roots: Sequence[Path]
) -> None:
    """Refuse a plan without a usable clip.

    Raises:
        ManifestError: Lists the failures, and how to find missing sources.
    """
    if not plan.clips:
        lost = _advice(clips, plan.failures, roots)
        raise no_usable_clip(plan.failures, manifests, lost)


def require_videos(failures: Sequence[Failure], rank: Rank) -> None:
    """Refuse a rank without videos that others may have: it would publish a smaller view.

    Raises:
        ManifestError: Names the machine and the clips without a video.
    """
    lacking = [f.message for f in failures if f.code in ("missing", "unreadable")]
    if rank.world > 1 and lacking:
        raise ManifestError(
            "\n".join(
                [
                    f"{socket.gethostname()} lacks {len(lacking)} clips' videos, and another "
                    "machine may have them; mount them under the same path, or take them out of "
                    "the manifest:",
                    *listed(lacking, "clip", "without a video here"),
                ]
            )
        )


def require_some_sources(
    clips: Sequence[Clip], plan: Plan, unread: Sequence[Failure], roots: Sequence[Path]
) -> None:
    """Log the advice for missing sources; refuse if no clip can be encoded without them.

    Args:
        clips: Clips of the manifests.
        plan: After `find_missing`: clips with rows in the store need no source.
        unread: Clips without a readable source, before `find_missing`.
        roots: Folders given with --source-root.

    Raises:
        ManifestError: Every clip lacks both its source and its row.
    """
    failures = [failure for failure in unread if failure not in plan.unread]
    lost = _advice(clips, [*plan.failures, *failures], roots)
    if lost and len(failures) == len(plan.clips):
        raise ManifestError("\n".join([*_no_clip([*plan.failures, *failures]), lost]))
    if lost:
        log.warning("%s", lost)


def _advice(clips: Sequence[Clip], failures: Sequence[Failure], roots: Sequence[Path]) -> str:
    """Explain how to find missing sources; empty if none is missing."""
    lost = {failure.clip_id for failure in failures if failure.code == "missing"}
    return advice(
        (clip.source for clip in clips if clip.clip_id in lost),
        len({clip.path for clip in clips}),
        roots,
    )


def no_usable_clip(
    failures: Sequence[Failure], manifests: Sequence[Path], lost: str = ""
) -> ManifestError:
    """Refusal of manifests without a usable clip.

    Args:
        failures: Reasons, by clip.
        manifests: Paths of the manifests.
        lost: Advice for missing sources; empty if none is missing.
    """
    command = shlex.join(["wanlora", "verify", *map(str, manifests)])
    return ManifestError("\n".join([*_no_clip(failures), lost or f"look at them with: {command}"]))


def _no_clip(failures: Sequence[Failure]) -> list[str]:
    shown = [f"[{f.code}] {f.clip_id}: {f.message}" for f in failures]
    return ["no clip of the manifests can be used", *listed(shown, "clip", "failed")]
