"""Captions that are nearly the same.

Owns: the similarity of two texts and the search for similar pairs. Must not know: clips.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

THRESHOLD = 0.8

MAX_PAIRS = 1_000
MAX_COMPARISONS = 2_000_000
"""Limits of a search, reached after one or two seconds. Captions made from a template are all
similar, and the number of their pairs grows with the square of their number."""


class Similar(NamedTuple):
    """Pairs of indices with their similarity, sorted; `complete` if no limit was reached."""

    pairs: list[tuple[int, int, float]]
    complete: bool


def words(text: str) -> frozenset[str]:
    """Words of a text, without case, order or punctuation."""
    return frozenset(re.findall(r"\w+", text.casefold()))


def difference(one: str, other: str, *, around: int = 3) -> str:
    """Show the words that differ, with those around them: `...walks to the [left | right] side`.

    Args:
        one: A text.
        other: Another text.
        around: Words of context on each side of a difference.
    """
    ours, theirs = one.split(), other.split()
    matcher = SequenceMatcher(None, ours, theirs, autojunk=False)
    groups = []
    for operations in matcher.get_grouped_opcodes(around):
        words = []
        for tag, i1, i2, j1, j2 in operations:
            mine, its = " ".join(ours[i1:i2]), " ".join(theirs[j1:j2])
            words.append(mine if tag == "equal" else f"[{mine or '-'} | {its or '-'}]")
        groups.append(" ".join(words))
    return " ... ".join(groups) or "spaces"


def similar_pairs(
    texts: Sequence[str],
    *,
    threshold: float = THRESHOLD,
    max_pairs: int = MAX_PAIRS,
    max_comparisons: int = MAX_COMPARISONS,
) -> Similar:
    """Find the pairs with a Jaccard similarity |a and b| / |a or b| of words >= threshold, exactly.

    Two sets that similar share one of their ceil((1 - threshold) * size) + 1 rarest words (the
    prefix filter of set-similarity joins), so only such pairs are compared.

    Args:
        texts: Texts without repeats.
        threshold: Minimum similarity, in (0, 1].
        max_pairs: Maximum number of pairs.
        max_comparisons: Approximate maximum number of comparisons.
    """
    sets = [words(text) for text in texts]
    frequency = Counter(word for found in sets for word in found)
    place = {word: index for index, word in enumerate(sorted(frequency, key=frequency.__getitem__))}
    holders: dict[str, list[int]] = defaultdict(list)
    pairs: list[tuple[int, int, float]] = []
    num_comparisons = 0
    for index, found in enumerate(sets):
        rarest = sorted(found, key=place.__getitem__)
        prefix = rarest[: len(rarest) - math.ceil(threshold * len(rarest)) + 1]
        shortest, longest = threshold * len(found), len(found) / threshold
        others = set[int]().union(*(holders[word] for word in prefix))
        for other in others:
            if shortest <= len(sets[other]) <= longest:
                shared = len(found & sets[other])
                similarity = shared / (len(found) + len(sets[other]) - shared)
                if similarity >= threshold:
                    pairs.append((other, index, similarity))
        for word in prefix:
            holders[word].append(index)
        num_comparisons += len(others)
        if len(pairs) > max_pairs or num_comparisons > max_comparisons:
            return Similar(sorted(pairs)[:max_pairs], complete=False)
    return Similar(sorted(pairs), complete=True)
