"""Where a video is cut, and which videos are held out. Pure values.

Owns: the modes chunk and head, trimming of short videos, and the split by group.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from wanlora.core.buckets import TEMPORAL_FACTOR
from wanlora.core.fingerprint import sha256_text


class Cut(NamedTuple):
    """A clip inside a video."""

    start_s: float
    num_frames: int


def cuts(
    available: int,
    *,
    num_frames: int,
    fps: float,
    mode: Literal["chunk", "head"],
    short: Literal["trim", "drop"],
    min_frames: int,
) -> list[Cut]:
    """Cut a video end to end into clips, or take its head; none when it is too short.

    Args:
        available: Frames that the video holds at `fps`.
        num_frames: Frames of a clip, 4k+1.
        fps: Frames a second of a clip.
        mode: chunk: as many clips as fit; head: the first.
        short: What to do with a video shorter than a clip: its longest 4k+1 frames, or nothing.
        min_frames: Shortest trimmed clip.
    """
    if available >= num_frames:
        count = available // num_frames if mode == "chunk" else 1
        return [Cut(index * num_frames / fps, num_frames) for index in range(count)]
    trimmed = available - (available - 1) % TEMPORAL_FACTOR
    if short == "drop" or available < 1 or trimmed < min_frames:
        return []
    return [Cut(0.0, trimmed)]


def held_out(activity_of: Mapping[str, str], *, val_fraction: float, seed: int) -> set[str]:
    """Choose the groups for validation: a share of all, spread evenly over activities.

    The groups of an activity are ordered by sha256(seed, group); the i-th of n stands at
    (i + 1/2) / n, and the first `val_fraction` of all groups in that order are held out. So a
    group's place depends on neither the order of files nor their number on disk. With two groups
    or more and a fraction above 0 at least one is held out; one always stays for training.

    Args:
        activity_of: Activity of each group.
        val_fraction: Share of groups, 0 for none.
        seed: Of the order.
    """
    if val_fraction <= 0 or len(activity_of) < 2:
        return set()
    draws = {group: sha256_text(f"{seed}:{group}") for group in activity_of}
    places: list[tuple[float, str, str]] = []
    for activity in sorted(set(activity_of.values())):
        members = sorted(
            (group for group in activity_of if activity_of[group] == activity),
            key=lambda group: draws[group],
        )
        places += [
            ((index + 0.5) / len(members), draws[group], group)
            for index, group in enumerate(members)
        ]
    count = min(max(1, round(val_fraction * len(places))), len(places) - 1)
    return {group for _, _, group in sorted(places)[:count]}


def unique_ids(names: Sequence[str]) -> list[str]:
    """Number the second and later ones of equal names: a, a-2, a-3."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return unique
