"""Weights of clips, and the share of draws that each activity gets in training.

Owns: the range of a weight, and the arithmetic and wording of shares. Must not know: the order of
training, manifests, stores.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from wanlora.core.buckets import Bucket
from wanlora.core.units import names, percent

MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0
"""Range of a clip's weight: wide enough for any mix, with a reasonable length of an epoch."""


def weight_problem(weight: float) -> str | None:
    """Expected range when a weight is outside it, else None."""
    if MIN_WEIGHT <= weight <= MAX_WEIGHT:
        return None
    return (
        f"expected a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g} (to leave a clip out, remove "
        "its line)"
    )


def shares(clips: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Expected share of draws of each activity, in [0, 1], by name.

    Args:
        clips: Activity and weight of each clip.
    """
    weights: dict[str, float] = defaultdict(float)
    for activity, weight in clips:
        weights[activity] += weight
    total = sum(weights.values())
    return {name: weights[name] / total for name in sorted(weights)}


def balanced_shares(clips: Iterable[tuple[Bucket, str, float]]) -> dict[str, float]:
    """`shares` of an `Order` with activities, which are balanced inside each bucket.

    Args:
        clips: Bucket, activity and weight of each clip.
    """
    totals: dict[Bucket, float] = defaultdict(float)
    activities: dict[Bucket, set[str]] = defaultdict(set)
    for bucket, activity, weight in clips:
        totals[bucket] += weight
        activities[bucket].add(activity)
    return shares(
        (name, totals[bucket] / len(names))
        for bucket, names in activities.items()
        for name in names
    )


def describe_shares(shares: Mapping[str, float], *, most: int = 12) -> str:
    """Shares of draws as text, the largest first: `walking 60.0 %, sitting 40.0 %`."""
    ordered = sorted(shares.items(), key=lambda item: (-item[1], item[0]))
    texts = (f"{name or 'no activity'} {percent(share)}" for name, share in ordered)
    return names(texts, most=most)
