"""How many source groups must be held out to measure a run.

Owns: that number, what follows from an interval, and the share of a data set that is enough.
Imports no torch: `prepare` counts groups too.
"""

import math
from collections.abc import Sequence

FEW_GROUPS = 6
"""With fewer source groups an interval is called wide: from 2.78 standard errors (5 groups) to 12.7
(2 groups) to either side, against 1.96 with many."""


UNDECIDED = "too few source groups to decide"


def describe_few_groups(num_held_out: int, num_groups: int) -> str | None:
    """Warning that too little is held out to measure a run, with what to do; None if enough is.

    Args:
        num_held_out: Source groups held out.
        num_groups: Source groups in all, at least 1.
    """
    if num_held_out >= FEW_GROUPS:
        return None
    found = f"held out: {num_held_out} of {num_groups} source groups (videos)"
    found += (
        f". With fewer than {FEW_GROUPS}, the interval of the held-out loss is so wide that it "
        "seldom shows what was learned"
        if num_held_out
        else ". There is no held-out loss, no comparison with the base and no best checkpoint"
    )
    share = fraction_for(FEW_GROUPS, num_groups)
    if share is None:
        return (
            f"{found}. Use at least {2 * FEW_GROUPS} source groups, and hold out {FEW_GROUPS} of "
            "them: wanlora prepare --val-fraction 0.5"
        )
    return f"{found}. Hold out {FEW_GROUPS} or more: wanlora prepare --val-fraction {share:g}"


def conclusion(ci95: Sequence[float] | None, num_groups: int | None) -> str:
    """Conclusion from a difference to the base: lower or higher only if the interval shows it.

    Args:
        ci95: Interval of the difference; None without one.
        num_groups: Source groups that were measured; None in records of releases before 0.2.
    """
    if ci95 is None or (num_groups is not None and num_groups < FEW_GROUPS):
        return UNDECIDED
    low, high = ci95
    return "lower" if high < 0 else "higher" if low > 0 else "no difference shown"


def fraction_for(num_held_out: int, num_groups: int) -> float | None:
    """Smallest multiple of 0.05 that holds out a number of groups; None if it is over 0.5."""
    share = math.ceil(20 * num_held_out / num_groups) / 20
    return share if share <= 0.5 else None
