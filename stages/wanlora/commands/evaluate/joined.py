"""Both experts of a model together: the change of the whole loss, and which expert gained.

Owns: the figures of evaluation.json about both experts, and the answer to "which expert has
something to learn?". Must not know: files, transformers.
Legend: N clips, Q noise levels of a range.

The training loss is an expectation over sigma. With p the probability of the high-noise range, it
is L = p L_high + (1 - p) L_low, and each expert decides one of the two terms. Both experts are
measured on the same clips, so their changes depend on each other: the change of L is computed for
each clip, then averaged for each source group, and only then an interval is made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from wanlora.core.intervals import MeanInterval, conclusion, mean_interval
from wanlora.wan.variants import Expert


@dataclass(frozen=True, slots=True)
class RangeLosses:
    """Losses of an expert on its own range, at midpoints of equal shares of the training density.

    Attributes:
        share: Probability of the range under the training density, in (0, 1).
        base: Losses of the base model.
        adapter: Losses with the adapter, on the same clips, noise levels and noise.
    """

    share: float
    base: Float[np.ndarray, "n q"]
    adapter: Float[np.ndarray, "n q"]

    @property
    def change(self) -> Float[np.ndarray, " n"]:
        """Change of each clip's mean loss in this range; below 0 is better than the base."""
        return np.asarray((self.adapter - self.base).mean(axis=1))


def join(ranges: Mapping[Expert, RangeLosses], groups: Sequence[str]) -> dict[str, Any]:
    """Change of the loss over all noise levels, with both adapters.

    Args:
        ranges: Losses of both experts on the same N clips; their shares add up to 1.
        groups: Source group of each clip.

    Returns:
        `base`, `adapter`, `paired_difference`, `standard_error`, `ci95`, `clips` and
        `source_groups`, as for one adapter.
    """
    assert abs(sum(part.share for part in ranges.values()) - 1) < 1e-9
    base, adapter = (
        mean_interval(sum_over_ranges, groups).mean
        for sum_over_ranges in (
            np.sum([part.share * part.base.mean(axis=1) for part in ranges.values()], axis=0),
            np.sum([part.share * part.adapter.mean(axis=1) for part in ranges.values()], axis=0),
        )
    )
    change = np.sum([part.share * part.change for part in ranges.values()], axis=0)
    figures = _figures(mean_interval(change, groups), len(groups))
    return {"base": base, "adapter": adapter, **figures}


def compare_gains(ranges: Mapping[Expert, RangeLosses], groups: Sequence[str]) -> dict[str, Any]:
    """Change of the high-noise expert minus that of the low-noise expert, each per unit of density.

    Args:
        ranges: Losses of both experts on the same N clips.
        groups: Source group of each clip.

    Returns:
        The difference with its interval, and in `larger_gain` the expert that gained more if the
        interval shows it, otherwise None.
    """
    found = mean_interval(ranges["high"].change - ranges["low"].change, groups)
    larger = {"lower": "high", "higher": "low"}.get(conclusion(found.ci95, found.num_groups))
    return {**_figures(found, len(groups)), "larger_gain": larger}


def _figures(found: MeanInterval, num_clips: int) -> dict[str, Any]:
    return {
        "paired_difference": found.mean,
        "standard_error": found.standard_error,
        "ci95": list(found.ci95) if found.ci95 else None,
        "clips": num_clips,
        "source_groups": found.num_groups,
    }


_ANSWERS = {
    "lower": "yes",
    "higher": "no, its loss became higher",
    "no difference shown": "not shown",
}


def answer(validations: Mapping[Expert, Mapping[str, Any]], gains: Mapping[str, Any] | None) -> str:
    """Answer "which expert has something to learn?" in one line.

    Args:
        validations: Figures of each adapter on its own range, as in evaluation.json.
        gains: From `compare_gains`; None with one adapter.
    """
    parts = []
    for expert, found in validations.items():
        verdict = conclusion(found["ci95"], found["source_groups"])
        parts.append(f"{expert}-noise expert: {_ANSWERS.get(verdict, verdict)}")
    line = f"Which expert has something to learn? {'; '.join(parts)}."
    if gains is None:
        return line
    more = gains["larger_gain"]
    high, low = (-validations[expert]["paired_difference"] for expert in ("high", "low"))
    reach = ""
    if gains["ci95"]:
        ends = sorted(-end for end in gains["ci95"])
        reach = f", 95 % interval {ends[0]:+.4f} to {ends[1]:+.4f}"
    verdict = (
        f"the {more}-noise expert gains more" if more else "neither gain is shown to be larger"
    )
    return (
        f"{line} Per unit of density {verdict}: high {high:+.4f}, low {low:+.4f} "
        f"(difference {high - low:+.4f}{reach})."
    )
