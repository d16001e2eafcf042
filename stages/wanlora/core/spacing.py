"""Evenly spaced choice from a sequence.

Owns: which indices are chosen. Must not know: what they are indices of.
"""

import numpy as np


def evenly_spaced(number: int, most: int) -> list[int]:
    """Choose at most `most` of `number` indices, evenly spaced, the first and the last among them.

    Args:
        number: Length of the sequence, >= 0.
        most: Maximum number of indices, at least 1; a single one is the first.
    """
    if number <= most:
        return list(range(number))
    places: list[int] = np.linspace(0, number - 1, most).round().astype(int).tolist()
    return places
