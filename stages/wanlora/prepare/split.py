"""Which videos are held out. Pure values.

Owns: the split by source group.
"""

from collections.abc import Iterable, Mapping

from wanlora.core.fingerprint import sha256_text
from wanlora.manifest import TRAIN, VAL


def draw(group: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the seed and the group's name."""
    return int(sha256_text(f"{seed}:{group}")[:13], 16) / 16**13


def held_out(
    groups: Iterable[str],
    *,
    val_fraction: float,
    seed: int,
    chosen: Mapping[str, str] | None = None,
) -> set[str]:
    """Choose the groups for validation: those whose draw is under `val_fraction`.

    A group's side does not depend on other groups, so adding, removing or renaming a video does
    not move the others (which would leak), and every activity has the same share in expectation.
    Exception: if a side would be empty, the group with the largest draw stays for training, or the
    one with the smallest is held out; that group may change sides when videos are added. A side
    is empty with probability (1 - val_fraction)^groups: 5 % for 60 groups at 0.05.

    Args:
        groups: Names of source groups.
        val_fraction: Share held out; 0 for none.
        seed: Of the draws.
        chosen: Groups whose side a person named, train or val; they are not drawn.
    """
    chosen = chosen or {}
    names = set(groups)
    held = {
        name
        for name in names
        if chosen.get(name, VAL if draw(name, seed) < val_fraction else TRAIN) == VAL
    }
    if held == names:
        drawn = [name for name in held if name not in chosen]
        held -= {max(drawn, key=lambda name: draw(name, seed))} if drawn else set()
    free = names - held - chosen.keys()
    if val_fraction > 0 and not held and len(names) > 1 and free:
        held = {min(free, key=lambda name: draw(name, seed))}
    return held
