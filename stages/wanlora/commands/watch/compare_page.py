"""Runs side by side: final numbers, overlaid curves, the settings that differ, newest previews.

Owns: which figures are drawn. Must not know: files.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from wanlora.commands.watch.details import RunData
from wanlora.commands.watch.list_page import ago, badge, best_loss, figure, link_to, rate, steps
from wanlora.commands.watch.live import LIVE, SERVED_POLICY
from wanlora.commands.watch.records import Row
from wanlora.core.units import duration
from wanlora.report.asset import asset, style
from wanlora.report.chart import COLOURS, Line, Point, charts, line_chart
from wanlora.report.page import Raw, escape, page, section, table

REFRESH_S = 15
SCRIPT = LIVE + asset("compare_page.js", REFRESH_MS=1000 * REFRESH_S)


def compare_page(runs: Sequence[RunData]) -> str:
    """Build the page."""
    notes = [f"{run.summary.name}: {note}" for run in runs for note in run.notes]
    parts = [
        *(Raw(f'<p class="warn">{escape(note)}</p>') for note in notes),
        _numbers(runs),
        section("Loss", *_panel_warning(runs), charts(*_curves(runs))),
        _settings(runs),
        *_previews(runs),
    ]
    sections = [
        Raw(style("list_page.css", "compare_page.css")),
        Raw('<p><a href="/">All runs</a> <span class="soft" id="fresh"></span></p>'),
        Raw(f'<div id="shown" data-live>{"".join(parts)}</div>'),
    ]
    title = " · ".join(run.summary.name for run in runs)
    return page(title, sections, script=SCRIPT, policy=SERVED_POLICY)


def _numbers(runs: Sequence[RunData]) -> Raw:
    shown = [run.summary for run in runs]
    heads = [
        Raw(f'<i class="swatch" style="border-color: {COLOURS[n]}"></i>{link_to(run.name)}')
        for n, run in enumerate(shown)
    ]
    losses = [run.loss if run.loss_smoothed is None else run.loss_smoothed for run in shown]
    rows: list[tuple[str, list[object]]] = [
        ("state", [badge(run) for run in shown]),
        ("steps", [steps(run) for run in shown]),
        ("time left", ["" if run.eta_s is None else duration(round(run.eta_s)) for run in shown]),
        ("training loss, smoothed", [figure(loss) for loss in losses]),
        ("best held-out loss", [best_loss(run.best) for run in shown]),
        ("after step", [f"{run.best.step:,}" if run.best else "" for run in shown]),
        ("expert", [run.expert or "" for run in shown]),
        ("rank", ["" if run.rank is None else str(run.rank) for run in shown]),
        ("learning rate", [rate(run.learning_rate) for run in shown]),
        ("seconds per step", [figure(run.metrics.median("s_per_step"), 3) for run in runs]),
        ("peak memory, GB", [figure(run.metrics.last.get("peak_memory_gb"), 3) for run in runs]),
        ("started", [ago(run.started_at) for run in shown]),
        ("last written", [ago(run.written_at) for run in shown]),
    ]
    filled = [[name, *values] for name, values in rows if any(values)]
    return table(["", *heads], filled, sortable=False)


def _curves(runs: Sequence[RunData]) -> list[Raw]:
    named = [(n, run.summary.name, run) for n, run in enumerate(runs)]
    held_out = [(n, name, _held_out(run.validations)) for n, name, run in named]
    return [
        line_chart(
            "Training loss, smoothed",
            [Line(name, run.metrics.curve("loss_smoothed"), n) for n, name, run in named],
        ),
        line_chart(
            "Held-out loss",
            [Line(name, [(row["step"], row["mean"]) for row in rows], n)
             for n, name, rows in held_out],
        ),
        line_chart(
            "Held-out loss against the base, %, with 95 % interval (below 0 is better)",
            [
                Line(name, [_change(row) for row in rows], n, band=_bands(rows))
                for n, name, rows in held_out
            ],
            zero=True,
        ),
        line_chart(
            "Learning rate", [Line(name, run.metrics.curve("lr"), n) for n, name, run in named]
        ),
    ]  # fmt: skip


def _held_out(validations: Sequence[Row]) -> list[Row]:
    """Held-out rows of the adapter itself, of the clips that are measured now."""
    rows = [
        row
        for row in validations
        if row["split"] == "val" and row.get("weights", "adapter") == "adapter"
    ]
    return [row for row in rows if row.get("panel") == rows[-1].get("panel")]


def _change(row: Row) -> Point:
    return float(row["step"]), 100 * row["difference"] / row["base_mean"]


def _bands(rows: Sequence[Row]) -> list[tuple[float, float, float]]:
    """Intervals of the change in %."""
    return [
        (float(row["step"]), *(100 * end / row["base_mean"] for end in row["ci95"]))
        for row in rows
        if row.get("ci95")
    ]


def _panel_warning(runs: Sequence[RunData]) -> list[Raw]:
    """Warn of held-out losses that do not compare."""
    panels = {run.summary.best.panel for run in runs if run.summary.best}
    if len(panels) <= 1:
        return []
    return [
        Raw(
            '<p class="warn">The held-out losses of these runs were measured on different clips or '
            "noise levels, so only their differences from the base model compare, roughly.</p>"
        )
    ]


def _settings(runs: Sequence[RunData]) -> Raw:
    """Table of the settings whose values differ; `output_dir` always does."""
    flat = [_flat(run.settings) for run in runs]
    names = sorted({name for each in flat for name in each} - {"output_dir", "resume"})
    rows = [
        [name, *(each.get(name, Raw('<span class="soft">not set</span>')) for each in flat)]
        for name in names
        if len({each.get(name) for each in flat}) > 1
    ]
    if not rows:
        return section("Settings that differ", "None: these runs have the same settings.")
    heads = [run.summary.name for run in runs]
    return section("Settings that differ", table(["setting", *heads], rows, sortable=False))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = str(value)
    return found


def _previews(runs: Sequence[RunData]) -> list[Raw]:
    """Newest preview of each prompt: a row per prompt, a column per run."""
    prompts = list(dict.fromkeys(prompt for run in runs for prompt in run.pictures))
    if not prompts:
        return []
    rows = "".join(
        f'<h3>{escape(prompt) or "(empty prompt)"}</h3><div class="pictures">'
        f"{''.join(_picture(run, prompt) for run in runs)}</div>"
        for prompt in prompts
    )
    return [section("Newest previews", "Approximate colours.", Raw(rows))]


def _picture(run: RunData, prompt: str) -> str:
    picture, name = run.pictures.get(prompt), escape(run.summary.name)
    if picture is None:
        return f'<figure><div class="none soft">none</div><figcaption>{name}</figcaption></figure>'
    data = base64.b64encode(picture.gif).decode()
    return (
        f'<figure><img src="data:image/gif;base64,{data}" alt="{escape(prompt)}">'
        f"<figcaption>{name}, step {picture.step:,}</figcaption></figure>"
    )
