"""The page of an evaluation: losses of adapters against the base, and their videos.

Owns: which figures are drawn and how they are named. Takes the content of evaluation.json, and
videos small enough for a page. Must not know: folders.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import UInt8

from wanlora.core import units
from wanlora.core.intervals import conclusion, describe_interval, describe_sample
from wanlora.report import evaluation_experts as experts
from wanlora.report.chart import COLOURS, Line, charts, line_chart
from wanlora.report.intervals import Interval, interval_chart
from wanlora.report.page import Raw, escape, facts, image, page, section, table
from wanlora.report.players import SCRIPT, STYLE, player, players

MEASURES = {
    "motion": "mean change of brightness from frame to frame, 0 (frozen) to 1; a moving camera or "
    "flicker counts as much as a moving person",
    "consistency": "correlation of successive frames, 1 = each predicts the next; flicker and "
    "boiling texture lower it, and so do cuts and fast motion",
    "sharpness": "spread of the Laplacian of brightness, 0 (flat) to 4; noise counts as detail",
    "diversity": "RMS distance between the videos of an activity at an eighth of the size, 0 (all "
    "the same) to 1; prompts and seeds are the same for every model",
}


FEW = 3
"""Up to this number each adapter has a verdict; with more, only the best has one."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A prompt and seed, and each model's video of it as a small mp4.

    Attributes:
        first_frame: First frame that all videos start from, with an image-to-video model.
    """

    activity: str
    prompt: str
    seed: int
    videos: Mapping[str, bytes]
    first_frame: UInt8[np.ndarray, "h w 3"] | None = None


def evaluation_page(evaluation: Mapping[str, Any], shown: Sequence[Shown]) -> str:
    """Build the page.

    Args:
        evaluation: As in evaluation.json.
        shown: Videos to put into the page, by activity.
    """
    adapters = evaluation["adapters"]
    panels = experts.panels(evaluation)
    in_detail = [item for panel in panels for item in _in_detail(panel)]
    sections = [STYLE, *(_verdict(item, evaluation) for item in in_detail)]
    if "answer" in evaluation:
        sections += experts.verdicts(evaluation)
    for panel in panels:
        sections += [_loss(panel), _numbers(panel.adapters, panel.best)]
    if evaluation.get("joined"):
        sections.append(experts.joined_section(evaluation))
    if evaluation["videos"]:
        sections += [_videos(evaluation, shown), _measures(evaluation["videos"]["measures"])]
    sections += [_meaning(), _made_with(evaluation)]
    names = units.names((item["name"] for item in adapters), separator=" · ")
    return page(f"{names} against the base", sections, script=SCRIPT)


def _in_detail(panel: experts.Panel) -> Sequence[Mapping[str, Any]]:
    """Adapters with a verdict and intervals by activity."""
    few = len(panel.adapters) <= FEW
    return [item for item in panel.adapters if few or item["name"] == panel.best]


def _verdict(item: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Raw:
    """State the difference in one sentence, with its interval."""
    found = item["validation"]
    change = _percent(found, found["paired_difference"])
    if found["ci95"] is None:
        kind, text = "soft", f"changes the held-out loss by {change:+.2f} %"
    else:
        reach = f"({describe_interval(found['ci95'], found['base'])})"
        verdict = conclusion(found["ci95"], found["source_groups"])
        kind, text = {
            "lower": ("good", f"lowers the held-out loss by {-change:.2f} % {reach}"),
            "higher": ("bad", f"raises the held-out loss by {change:.2f} % {reach}"),
        }.get(verdict, ("soft", f"changes the held-out loss by {change:+.2f} % {reach}: {verdict}"))
    sample = describe_sample(found["clips"], found["source_groups"])
    sampled = f"{sample}; {len(found['per_sigma'])} noise levels"
    expert = f"({experts.title(evaluation, item['expert'])}) " if "expert" in item else ""
    return Raw(
        f'<p class="verdict {kind}"><b>{escape(item["name"])}</b> {escape(expert + text)} '
        f'<span class="soft">{sampled}; paired with the base</span></p>'
    )


def _loss(panel: experts.Panel) -> Raw:
    """Draw intervals of every adapter, by activity for those in detail, and the curves."""
    adapters, in_detail = panel.adapters, _in_detail(panel)
    rows = []
    for number, item in enumerate(adapters):
        found = item["validation"]
        name = "all clips" if len(adapters) == 1 else item["name"]
        colour = number % len(COLOURS)
        rows.append(_interval(name, found, colour, bold=True))
        activities = found["per_activity"]
        if item in in_detail and len(activities) > 1:
            rows += [
                _interval(activity or "no activity", part, colour)
                for activity, part in activities.items()
            ]
    title = "Loss against the base, with 95 % intervals"
    intervals = interval_chart(title, rows, x_label="change in % (left is better)", unit=" %")
    curves = charts(*_by_sigma(adapters), *_by_step(adapters))
    return section(panel.title, Raw(f'<div class="intervals">{intervals}</div>'), curves)


def _by_sigma(adapters: Sequence[Mapping[str, Any]]) -> list[Raw]:
    """Draw the difference by noise level; bands only if there are few adapters."""
    changes, levels = [], []
    for number, item in enumerate(adapters):
        colour, rows = number % len(COLOURS), item["validation"]["per_sigma"]
        changes.append(
            Line(
                item["name"],
                [(row["sigma"], _percent(row, row["paired_difference"])) for row in rows],
                colour,
                band=[part for row in rows for part in _band(row["sigma"], row)]
                if len(adapters) <= FEW
                else [],
            )
        )
        levels.append(Line(item["name"], [(row["sigma"], row["adapter"]) for row in rows], colour))
    rows = adapters[0]["validation"]["per_sigma"]
    levels.append(Line("base", [(row["sigma"], row["base"]) for row in rows], -1, "dashed"))
    reach = ", 95 % interval" if len(adapters) <= FEW else ""
    return [
        line_chart(f"Change in % by noise level{reach}", changes, x_label="sigma", zero=True),
        line_chart("Loss by noise level", levels, x_label="sigma"),
    ]


def _by_step(adapters: Sequence[Mapping[str, Any]]) -> list[Raw]:
    """Draw the difference over the training steps of each run with several checkpoints."""
    by_run: dict[str, dict[int, Mapping[str, Any]]] = {}
    for item in adapters:
        if item["step"] is not None:
            by_run.setdefault(item["run"], {})[item["step"]] = item["validation"]
    lines = [
        Line(
            run,
            [(step, _percent(found, found["paired_difference"])) for step, found in rising],
            number % len(COLOURS),
            band=[part for step, found in rising for part in _band(step, found)],
        )
        for number, (run, steps) in enumerate(by_run.items())
        if len(steps) > 1
        for rising in [sorted(steps.items())]
    ]
    if not lines:
        return []
    return [line_chart("Change in % by training step, 95 % interval", lines, zero=True)]


def _interval(name: str, part: Mapping[str, Any], colour: int, *, bold: bool = False) -> Interval:
    ends = part["ci95"]
    return Interval(
        name,
        _percent(part, part["paired_difference"]),
        (_percent(part, ends[0]), _percent(part, ends[1])) if ends else None,
        colour,
        bold,
    )


def _numbers(adapters: Sequence[Mapping[str, Any]], best: str) -> Raw:
    rows = []
    for item in adapters:
        found, against = item["validation"], item["against_best"]
        row = [
            Raw(f"<b>{escape(item['name'])}</b>") if item["name"] == best else item["name"],
            "" if item["step"] is None else item["step"],
            found["adapter"],
            found["base"],
            _change(found),
        ]
        if len(adapters) > 1:
            row.append("the lowest loss" if item["name"] == best else _change(against, of="best"))
        rows.append(row)
    headers = ["adapter", "steps", "loss", "base", "change (95 % interval)"]
    return table([*headers, "against the lowest"] if len(adapters) > 1 else headers, rows)


def _change(found: Mapping[str, Any], *, of: str = "base") -> str:
    change = f"{100 * found['paired_difference'] / found[of]:+.2f} %"
    if found["ci95"] is None:
        return change
    low, high = (100 * end / found[of] for end in found["ci95"])
    return f"{change} ({low:+.2f} to {high:+.2f})"


def _videos(evaluation: Mapping[str, Any], shown: Sequence[Shown]) -> Raw:
    total, settings = len(evaluation["videos"]["list"]), evaluation["video_settings"]
    frames, height, width = settings["size"]
    guidance = f"{settings['guidance_scale']:g}"
    if "guidance_scale_low" in settings:
        guidance += f" (low-noise expert {settings['guidance_scale_low']:g})"
    parts: list[str] = [
        f"From the same noise, {settings['steps']} steps, guidance {guidance}, "
        f"{frames} frames of {width}×{height} px. {len(shown)} of {total} are shown here, "
        "compressed; all are files, named in evaluation.json. A real clip is the cached clip whose "
        "caption is the prompt, decoded by the same VAE.",
    ]
    if any(item.first_frame is not None for item in shown):
        parts.append(
            "All videos of a row start from the first frame of the real clip, whose encoding is "
            "cached. So their first frames should be the same, and the rest is the model's."
        )
    if shown:
        parts.append(
            Raw('<p><button type="button" id="play-all">play or pause videos in view</button></p>')
        )
    for activity, members in groupby(shown, key=lambda item: item.activity):
        rows = [_row(item) for item in members]
        parts += [Raw(f"<h3>{escape(activity or 'no activity')}</h3>"), players(*rows)]
    return section("Videos", *parts)


def _row(item: Shown) -> Raw:
    pictures = {}
    if item.first_frame is not None:
        pictures["first frame"] = image(item.first_frame, alt="first frame of the videos")
    return player(item.prompt, f"seed {item.seed}", item.videos, pictures=pictures)


def _measures(measures: Mapping[str, Any]) -> Raw:
    """Tabulate the paired differences over all videos, then a row per activity and model."""
    rows = [
        [activity or "no activity", name, *(values[measure] for measure in MEASURES)]
        for activity in next(iter(measures["per_activity"].values()))
        for name, by_activity in measures["per_activity"].items()
        for values in [by_activity[activity]]
    ]
    paired = [
        [name, *(_measure(found.get(measure)) for measure in MEASURES)]
        for name, found in measures["against_base"].items()
    ]
    prompts = {found["motion"]["prompts"] for found in measures["against_base"].values()}
    return section(
        "Measures of the videos",
        "They distinguish frozen, flickering, blurred and collapsed videos from others. None of "
        "them measures what a video shows: look at the videos.",
        facts(MEASURES),
        Raw(
            "<h3>Difference to the base's videos, paired (95 % interval over "
            f"{', '.join(map(str, sorted(prompts)))} prompts)</h3>"
        ),
        table(["adapter", *MEASURES], paired),
        Raw("<h3>By activity</h3>"),
        table(["activity", "model", *MEASURES], rows),
    )


def _measure(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    low_high = found["ci95"]
    reach = f" ({low_high[0]:+.3g} to {low_high[1]:+.3g})" if low_high else ""
    return f"{found['paired_difference']:+.3g}{reach}"


def _meaning() -> Raw:
    return section(
        "Reading this page",
        "The loss is the training loss, on clips that are not used for training. Noise levels and "
        "noise are the same for every model, so that two losses differ by the model alone. Clips "
        "of one source are not independent, so each source group's mean difference to the base is "
        "one number, and the interval is Student's over source groups. If an interval contains "
        "zero, this number of groups shows no difference; its dot is hollow, and so is the dot of "
        "a single group, which has no interval. With few groups the interval is always wide.",
        "An interval is for one comparison. Of twenty activities without any effect, one will "
        "probably show one. A lower loss means that held-out clips of this kind became likelier, "
        "not that a person prefers the videos.",
    )


def _made_with(evaluation: Mapping[str, Any]) -> Raw:
    return section(
        "Made with",
        facts(
            {
                "model": evaluation["model"],
                **{
                    f"adapter {item['name']}": f"{item['path']} at {item['scale']:g}, sha256 "
                    f"{item['sha256'][:16]}"
                    for item in evaluation["adapters"]
                },
                "cache": f"{evaluation['cache']}, view {evaluation['view']}, split "
                f"{evaluation['split']}",
                "seed": evaluation["seed"],
                **{
                    name: f"{evaluation['dtype']} on {evaluation['device']}, sha256 {sha256[:16]}"
                    for name, sha256 in evaluation["weights"].items()
                    if name.startswith("transformer")
                },
                "clips": ", ".join(evaluation["clips"]),
                "wanlora": evaluation["wanlora"],
            }
        ),
    )


def _band(place: float, found: Mapping[str, Any]) -> list[tuple[float, float, float]]:
    """An interval at a place of the x axis, in %; empty if it is not known."""
    if found["ci95"] is None:
        return []
    low, high = found["ci95"]
    return [(place, _percent(found, low), _percent(found, high))]


def _percent(found: Mapping[str, Any], value: float) -> float:
    return 100 * value / float(found["base"])
