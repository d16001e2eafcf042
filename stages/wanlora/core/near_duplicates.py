"""Captions that say nearly the same.

Owns: the similarity of two texts and the search for similar pairs. Knows nothing of clips.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

THRESHOLD = 0.8


def words(text: str) -> frozenset[str]:
    """Words of a text, without case, order or punctuation."""
    return frozenset(re.findall(r"\w+", text.casefold()))


def similar_pairs(
    texts: Sequence[str], *, threshold: float = THRESHOLD
) -> list[tuple[int, int, float]]:
    """Find all pairs with a Jaccard similarity |a and b| / |a or b| of words >= threshold, exactly.

    Two sets that similar share one of their ceil((1 - threshold) * size) + 1 rarest words (the
    prefix filter of set-similarity joins), so only such pairs are compared.

    Args:
        texts: Different texts.
        threshold: In (0, 1].
    """
    sets = [words(text) for text in texts]
    frequency = Counter(word for found in sets for word in found)
    place = {word: index for index, word in enumerate(sorted(frequency, key=frequency.__getitem__))}
    masks = [sum(1 << place[word] for word in found) for found in sets]
    holders: dict[str, list[int]] = defaultdict(list)
    pairs = []
    for index, (found, mask) in enumerate(zip(sets, masks, strict=True)):
        rarest = sorted(found, key=place.__getitem__)
        prefix = rarest[: len(rarest) - math.ceil(threshold * len(rarest)) + 1]
        shortest, longest = threshold * len(found), len(found) / threshold
        for other in set[int]().union(*(holders[word] for word in prefix)):
            if shortest <= len(sets[other]) <= longest:
                similarity = (mask & masks[other]).bit_count() / (mask | masks[other]).bit_count()
                if similarity >= threshold:
                    pairs.append((other, index, similarity))
        for word in prefix:
            holders[word].append(index)
    return sorted(pairs)
