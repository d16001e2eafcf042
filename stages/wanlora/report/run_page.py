"""The page of a run: what was trained, its curves, and what it showed along the way.

Owns: which figures are drawn and how they are named. Takes rows as metrics.jsonl and
validation.jsonl hold them; knows nothing of folders.
"""

import base64
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wanlora.core.validation import describe_sample
from wanlora.report.chart import Line, charts, line_chart, means
from wanlora.report.page import Raw, escape, facts, page, section, table

Row = Mapping[str, Any]

CURVES = {
    ("val", "adapter"): ("held-out", 0),
    ("val", "ema"): ("held-out, moving average", 2),
    ("train", "adapter"): ("training", 1),
}
"""(split, weights) to name and colour."""


@dataclass(frozen=True, slots=True)
class Preview:
    """An approximate picture of a video made while training."""

    step: int
    prompt: str
    gif: bytes


def run_page(
    name: str,
    *,
    settings: Mapping[str, Any],
    metrics: Sequence[Row],
    validations: Sequence[Row],
    previews: Sequence[Preview] = (),
    note: str = "",
) -> str:
    """Build the page; what a run has not got is left out.

    Args:
        name: The run's name.
        settings: As in config.toml, nested.
        metrics: Rows of metrics.jsonl.
        validations: Rows of validation.jsonl.
        previews: By rising step.
        note: Said above the previews.
    """
    shown = _comparable(validations)
    left_out, validations = len(validations) - len(shown), shown
    sections = [
        facts(_summary(settings, metrics, validations)),
        section("Loss", charts(_loss(metrics), _validation_loss(validations))),
    ]
    if left_out:
        sections.append(
            Raw(
                f"<p>{left_out} earlier rows of validation.jsonl, measured on other clips or with "
                "other settings, are not shown.</p>"
            )
        )
    if validations:
        sections.append(_validation(validations))
    sections.append(section("Speed", charts(*_speed(metrics))))
    if previews:
        sections.append(_previews(previews, note))
    rows = sorted(_flat(settings))
    sections.append(
        section("Settings", Raw(f"<details><summary>all {len(rows)}</summary>"
                f"{table(['setting', 'value'], rows, sortable=False)}</details>"))
    )  # fmt: skip
    return page(f"Run {name}", sections)


def _summary(
    settings: Mapping[str, Any], metrics: Sequence[Row], validations: Sequence[Row]
) -> dict[str, object]:
    last = metrics[-1] if metrics else {}
    held_out = [row for row in validations if row["split"] == "val"]
    summary: dict[str, object] = {
        "steps done": f"{last['step'] + 1:,}" if last else "none yet",
        "loss, smoothed": _figure(last.get("loss_smoothed")),
        "seconds a step": _figure(_median(row.get("s_per_step") for row in metrics[-200:])),
        "MFU": _percent(last.get("mfu")),
        "TFLOP/s": _figure(_median(row.get("tflops") for row in metrics[-200:])),
        "peak memory": f"{last['peak_memory_gb']:.3g} GB" if "peak_memory_gb" in last else None,
        "model": settings.get("model"),
    }
    if held_out:
        best = min(held_out, key=lambda row: float(row["mean"]))
        summary["best held-out loss"] = (
            f"{best['mean']:.4f} at step {best['step']:,} ({_change(best)} against the base)"
            + (", moving average" if best.get("weights") == "ema" else "")
        )
    return {key: value for key, value in summary.items() if value is not None}


def _loss(metrics: Sequence[Row]) -> Raw:
    return line_chart(
        "Training loss",
        [
            Line("each step", _curve(metrics, "loss"), style="faint"),
            Line("smoothed", _curve(metrics, "loss_smoothed")),
        ],
    )


def _validation_loss(validations: Sequence[Row]) -> Raw:
    lines = []
    for rows, weights, name, colour in _curves(validations):
        lines.append(Line(name, _curve(rows, "mean"), colour))
        if weights == "adapter":
            lines.append(Line(f"base ({name})", _curve(rows, "base_mean"), colour, "dashed"))
    return line_chart("Validation loss of fixed clips", lines)


def _validation(validations: Sequence[Row]) -> Raw:
    """Difference to the base with its interval; then the last validation by sigma and activity."""
    differences, by_sigma, samples = [], [], []
    activities: list[list[object]] = []
    for rows, weights, name, colour in _curves(validations):
        band = [(float(row["step"]), *row["ci95"]) for row in rows if row.get("ci95")]
        differences.append(Line(name, _curve(rows, "difference"), colour, band=band))
        last = rows[-1]
        samples.append(f"{name}: {describe_sample(last['num_clips'], last.get('num_groups'))}")
        sigmas = sorted(last["per_sigma"])
        by_sigma.append(Line(name, [(s, loss) for s, loss, _ in sigmas], colour))
        if weights == "adapter":
            base_line = [(s, base) for s, _, base in sigmas]
            by_sigma.append(Line(f"base ({name})", base_line, colour, "dashed"))
        activities += [
            [activity or "none", name, loss, base, f"{100 * (loss - base) / base:+.2f} %"]
            for activity, (loss, base) in sorted(last["per_activity"].items())
        ]
    step = validations[-1]["step"]
    headers = ["activity", "clips", "loss", "base", "change"]
    return section(
        "Against the base model",
        "; ".join(samples),
        charts(
            line_chart(
                "Loss minus base, 95 % interval (below 0 is better)", differences, zero=True
            ),
            line_chart(f"By noise level at step {step:,}", by_sigma, x_label="sigma"),
        ),
        *([table(headers, activities)] if activities else []),
    )


def _comparable(validations: Sequence[Row]) -> list[Row]:
    """Rows of the panels that are measured now: losses of other panels do not compare."""
    panels = {row["split"]: row.get("panel") for row in validations}
    return [row for row in validations if row.get("panel") == panels[row["split"]]]


def _curves(validations: Sequence[Row]) -> Iterator[tuple[list[Row], str, str, int]]:
    """Rows, weights, name and colour of each curve that has rows."""
    for (split, weights), (name, colour) in CURVES.items():
        # Releases before 0.2 recorded no weights.
        rows = [
            row
            for row in validations
            if (row["split"], row.get("weights", "adapter")) == (split, weights)
        ]
        if rows:
            yield rows, weights, name, colour


def _speed(metrics: Sequence[Row]) -> list[Raw]:
    with_mfu = any(row.get("mfu") is not None for row in metrics)
    achieved = (
        line_chart("Model FLOPs utilisation (MFU)", _noisy(metrics, "mfu"), zero=True)
        if with_mfu
        else line_chart("Achieved TFLOP/s", _noisy(metrics, "tflops"), zero=True)
    )
    return [
        line_chart("Learning rate", [Line("lr", _curve(metrics, "lr"))]),
        line_chart("Gradient norm, before clipping", _noisy(metrics, "grad_norm"), log_y=True),
        line_chart("Clips a second", _noisy(metrics, "clips_per_s"), zero=True),
        line_chart("Waiting for data, % of a step", _noisy(metrics, "data_wait_pct"), zero=True),
        achieved,
        line_chart(
            "Peak memory, GB", [Line("memory", _curve(metrics, "peak_memory_gb"))], zero=True
        ),
    ]


def _noisy(metrics: Sequence[Row], key: str) -> list[Line]:
    """Every step, and the trend once there are steps enough for one."""
    points = _curve(metrics, key)
    trend = means(points)
    return [Line("each step", points, style="faint" if trend else "solid"), Line("mean", trend)]


def _previews(previews: Sequence[Preview], note: str) -> Raw:
    """A row a step, newest first, a column a prompt."""
    prompts = list(dict.fromkeys(preview.prompt for preview in previews))
    by_place = {(preview.step, preview.prompt): preview.gif for preview in previews}
    steps = sorted({preview.step for preview in previews}, reverse=True)
    rows = [
        [step, *(_picture(by_place.get((step, prompt)), prompt) for prompt in prompts)]
        for step in steps
    ]
    return section(
        "Previews",
        "Approximate colours: latents through a linear projection. To decode them: "
        "wanlora sample --latents with this run's folder.",
        *([note] if note else []),
        table(["step", *prompts], rows, sortable=False),
    )


def _picture(gif: bytes | None, prompt: str) -> Raw:
    if gif is None:
        return Raw("")
    data = base64.b64encode(gif).decode()
    # Real previews are 416 px wide; those of the embedded model would be stamps.
    return Raw(
        f'<img src="data:image/gif;base64,{data}" style="min-width: 192px" loading="lazy" '
        f'alt="{escape(prompt)}">'
    )


def _curve(rows: Iterable[Row], key: str) -> list[tuple[float, float]]:
    return [
        (float(row["step"]), float(row[key]))
        for row in rows
        if row.get(key) is not None and math.isfinite(row[key])
    ]


def _median(values: Iterable[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _change(row: Row) -> str:
    return f"{100 * row['difference'] / row['base_mean']:+.2f} %"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{key}.")
        else:
            flat.append((prefix + key, str(value)))
    return flat
