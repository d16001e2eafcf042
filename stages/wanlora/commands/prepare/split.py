"""Split of the clips by source group into training and validation. Pure functions.

Owns: the split by source group, balanced over activities. Must not know: files.
"""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from wanlora.core.fingerprint import sha256_text
from wanlora.data.captions import Source
from wanlora.data.clip import TRAIN, VAL, Clip
from wanlora.errors import ManifestError

LARGE = 8
"""Expected number of held-out groups from which an activity's draws are balanced enough: their
standard deviation is then at most sqrt(8), 2.8 groups."""


def split_clips(
    clips: Sequence[Clip],
    sources: Sequence[Source],
    *,
    val_fraction: float,
    seed: int,
    as_0_1_0: bool = False,
) -> list[Clip]:
    """Set the split of each clip, or with `as_0_1_0` the one that release 0.1.0 set.

    Raises:
        ManifestError: Sources of one group are named train and val.
    """
    chosen_for = {source.path: source.split for source in sources if source.split}
    chosen: dict[str, str] = {}
    for clip in clips:
        side = chosen_for.get(clip.path)
        if side and chosen.setdefault(clip.source_group, side) != side:
            raise ManifestError(
                f"source group {clip.source_group} ({clip.source}) is named both train and val; "
                "clips of one group must be on one side, or validation would see training videos"
            )
    choose = held_out_by_0_1_0 if as_0_1_0 else held_out
    val = choose(group_activities(clips), val_fraction=val_fraction, seed=seed, chosen=chosen)
    return [replace(clip, split=VAL if clip.source_group in val else TRAIN) for clip in clips]


def draw(group: str, seed: int) -> float:
    """Draw a number in [0, 1) that depends only on the seed and the group's name."""
    return int(sha256_text(f"{seed}:{group}")[:13], 16) / 16**13


def held_out(
    activities: Mapping[str, str],
    *,
    val_fraction: float,
    seed: int,
    chosen: Mapping[str, str] | None = None,
) -> set[str]:
    """Choose the groups for validation.

    An activity with `LARGE` or more expected held-out groups holds out those whose draw is under
    `val_fraction`, so no group's side depends on another group. Only if this is under a half or
    over three halves of the share, the groups with the nearest draws change sides. In smaller
    activities the draw could hold out none, or half of the clips. They share `val_fraction` of
    their groups, rounded: first one for each activity, the largest first, then in proportion to
    their groups (the method of Sainte-Lague). Within an activity, the groups with the smallest
    draws are held out. A video that is added moves at most three others, and a few
    more when its activity reaches `LARGE`.

    An activity keeps at least one group for training. Activities of one group count as one
    activity together, which comes after the others and gets no more than its share, rounded down.

    Args:
        activities: Activity of each source group, by the group's name.
        val_fraction: Share held out; 0 for none.
        seed: Seed of the draws.
        chosen: Groups with a side that a person named, train or val.
    """
    chosen = chosen or {}
    named = {group for group in activities if chosen.get(group) == VAL}
    if val_fraction <= 0:
        return named
    draws = {group: draw(group, seed) for group in activities}
    members = _by_activity(activities, draws)
    free = {name: [g for g in own if g not in chosen] for name, own in members.items()}
    before = {name: len(named.intersection(own)) for name, own in members.items()}
    seats = {
        name: before[name] + sum(draws[group] < val_fraction for group in free[name])
        for name, own in members.items()
        if val_fraction * len(own) >= LARGE
    }
    for name, number in seats.items():
        size, share = len(members[name]), val_fraction * len(members[name])
        within = max(math.ceil(share / 2), min(number, math.floor(1.5 * share)))
        seats[name] = min(within, size - 1)
    small = {name: len(own) for name, own in members.items() if name not in seats}
    seats |= _seats(small, before, val_fraction, everywhere=_reaches_all(members, val_fraction))
    drawn = (free[name][: max(0, seats[name] - before[name])] for name in members)
    return named.union(*drawn)


def held_out_by_0_1_0(
    groups: Collection[str], *, val_fraction: float, seed: int, chosen: Mapping[str, str]
) -> set[str]:
    """Return the groups that release 0.1.0 held out (only by draws), to recognize its manifests.

    If a side was empty, the group with the largest draw was trained, or the smallest held out.
    """
    by_draw = sorted(groups, key=lambda group: (draw(group, seed), group))
    free = [group for group in by_draw if group not in chosen]
    named = {group for group in by_draw if chosen.get(group) == VAL}
    held = named.union(group for group in free if draw(group, seed) < val_fraction)
    if len(held) == len(by_draw):
        return held - set(free[-1:])
    if not held and val_fraction > 0 and len(by_draw) > 1:
        return set(free[:1])
    return held


def _by_activity(
    activities: Mapping[str, str], draws: Mapping[str, float]
) -> dict[str | None, list[str]]:
    """Groups of each activity by rising draw; None for all activities of one group together."""
    members: dict[str | None, list[str]] = defaultdict(list)
    for group in sorted(activities, key=lambda group: (draws[group], group)):
        members[activities[group]].append(group)
    single = [name for name, own in members.items() if len(own) == 1]
    if len(single) > 1 or len(members) > 1:
        alone = [group for name in single for group in members.pop(name)]
        members |= {None: sorted(alone, key=lambda group: (draws[group], group))} if alone else {}
    return dict(members)


def _reaches_all(members: Mapping[str | None, list[str]], val_fraction: float) -> bool:
    """Return whether the share is at least one group for each activity of two or more groups."""
    num_groups = sum(map(len, members.values()))
    return _rounded(val_fraction * num_groups) >= len(members.keys() - {None})


def _seats(
    sizes: Mapping[str | None, int],
    before: Mapping[str | None, int],
    val_fraction: float,
    *,
    everywhere: bool,
) -> dict[str | None, int]:
    """Number of groups that each small activity holds out, those named by a person included.

    Args:
        sizes: Number of groups of each small activity, by rising smallest draw.
        before: Number of groups of each activity that a person named val.
        val_fraction: Share held out.
        everywhere: Hold out a group of each activity of two or more groups, even if its share is
            smaller.
    """
    most = {name: size - 1 for name, size in sizes.items()}
    if None in sizes and len(before) > 1:
        most[None] = math.floor(val_fraction * sizes[None])
    seats = {name: before[name] for name in sizes}
    left = _rounded(val_fraction * sum(sizes.values())) - sum(seats.values())
    if everywhere:
        left = max(left, sum(not seats[name] for name in sizes if name is not None))
    if len(sizes) == len(before) and not any(seats.values()):
        left = max(left, 1)
    place = {name: index for index, name in enumerate(sizes)}

    def priority(name: str | None) -> tuple[bool, float, int]:
        """An activity without a held-out group comes first; then by groups per held-out group."""
        served = seats[name] > 0 or (name is None and len(before) > 1)
        return served, -sizes[name] / (2 * seats[name] + 1), place[name]

    queue = [(priority(name), name) for name in sizes]
    heapq.heapify(queue)
    while queue and left > 0:
        _, name = heapq.heappop(queue)
        if seats[name] < most[name]:
            seats[name] += 1
            left -= 1
            heapq.heappush(queue, (priority(name), name))
    return seats


def _rounded(value: float) -> int:
    """Round to the nearest whole number, halves up."""
    return math.floor(value + 0.5)


def group_activities(clips: Iterable[Clip]) -> dict[str, str]:
    """Activity of each source group: that of most of its clips, the first by name among equals."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for clip in clips:
        counts[clip.source_group][clip.activity] += 1
    return {
        group: min(found, key=lambda name: (-found[name], name)) for group, found in counts.items()
    }
