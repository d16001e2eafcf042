"""Parts of an evaluation's page about the two transformers of a model.

Owns: the panel of each expert, and what is shown of both together. Takes the content of
evaluation.json.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from wanlora.core.intervals import conclusion, describe_change, describe_sample
from wanlora.core.units import percent
from wanlora.report.intervals import Interval, interval_chart
from wanlora.report.page import Raw, escape, section

LOSS = "Held-out loss"


class Panel(NamedTuple):
    """Adapters that were measured on the same clips and noise levels.

    Attributes:
        title: Title of their section.
        adapters: As in evaluation.json.
        best: Name of the one with the lowest loss.
    """

    title: str
    adapters: Sequence[Mapping[str, Any]]
    best: str


def panels(evaluation: Mapping[str, Any]) -> list[Panel]:
    """Panel of each transformer, highest noise first; one for a model with one transformer."""
    adapters = evaluation["adapters"]
    if "experts" not in evaluation:
        return [Panel(LOSS, adapters, evaluation["best"])]
    return [
        Panel(
            f"{LOSS}: {title(evaluation, expert)}",
            [item for item in adapters if item["expert"] == expert],
            evaluation["best_by_expert"][expert],
        )
        for expert in evaluation["experts"]
    ]


def title(evaluation: Mapping[str, Any], expert: str) -> str:
    """Name an expert with its range and its share of the density of the noise levels."""
    own = evaluation["experts"][expert]
    low, high = own["sigma_range"]
    density = evaluation["density"]
    return (
        f"{expert}-noise expert, sigma {low:g} to {high:g}, {percent(own['share'])} of "
        f"{density['sampler']}, shift {float(density['shift']):g}"
    )


def verdicts(evaluation: Mapping[str, Any]) -> list[Raw]:
    """State the change of the whole loss, and which expert has something to learn."""
    found, lines = evaluation["joined"], []
    if found:
        change = describe_change(found["paired_difference"], found["base"], found["ci95"])
        kind = {"lower": "good", "higher": "bad"}.get(
            conclusion(found["ci95"], found["source_groups"]), "soft"
        )
        sample = describe_sample(found["clips"], found["source_groups"])
        lines.append(
            Raw(
                f'<p class="verdict {kind}"><b>both experts</b> change the held-out loss over all '
                f'noise levels by {escape(change)} <span class="soft">{sample}; paired with the '
                "base</span></p>"
            )
        )
    return [*lines, Raw(f'<p class="verdict soft">{escape(evaluation["answer"])}</p>')]


def joined_section(evaluation: Mapping[str, Any]) -> Raw:
    """Draw the change of the whole loss, and the part of it that each expert contributes."""
    found, density = evaluation["joined"], evaluation["density"]
    rows = [_interval("all noise levels", found, 1.0, found["base"], 2, bold=True)]
    named = {item["expert"]: item for item in evaluation["adapters"] if item["named"]}
    for number, (expert, own) in enumerate(evaluation["experts"].items()):
        part = named[expert]["validation"]
        rows.append(_interval(f"{expert}-noise expert", part, own["share"], found["base"], number))
    chart = interval_chart(
        "Part of each expert in the change, with 95 % intervals", rows,
        x_label="change in % of the whole loss (left is better)", unit=" %",
    )  # fmt: skip
    return section(
        "Both experts together",
        "The training loss is a mean over all noise levels, and each expert decides its own range. "
        "So the whole change is the change in each range times the share of the range in the "
        f"density of the noise levels ({density['sampler']}, shift {float(density['shift']):g}). "
        "Both experts are measured on the same clips: the sum is made for each clip, and the "
        "interval is over the source groups of these sums.",
        Raw(f'<div class="intervals">{chart}</div>'),
    )


def _interval(
    name: str, found: Mapping[str, Any], share: float, base: float, colour: int, *,
    bold: bool = False,
) -> Interval:  # fmt: skip
    """A difference times a share, in % of the base's whole loss."""
    factor = 100 * share / base
    ends = found["ci95"]
    return Interval(
        name,
        factor * found["paired_difference"],
        (factor * ends[0], factor * ends[1]) if ends else None,
        colour,
        bold,
    )
