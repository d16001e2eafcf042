"""The page of a run: state, curves, validation, samples of prompts, speed, warnings and settings.

Owns: which figures are drawn and how they are named. Takes rows as metrics.jsonl, validation.jsonl
and status.json hold them. Must not know: folders.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from wanlora.core.intervals import conclusion, describe_sample
from wanlora.report.chart import Line, Point, charts, line_chart
from wanlora.report.gallery import Preview, gallery
from wanlora.report.page import Raw, escape, page, section, table, tiles
from wanlora.report.run_status import SCRIPT, status_banner
from wanlora.report.series import Metrics

Row = Mapping[str, Any]

CURVES = {
    ("val", "adapter"): ("held-out", 0),
    ("val", "ema"): ("held-out, moving average", 2),
    ("train", "adapter"): ("training", 1),
}
"""(split, weights) to name and colour."""
MAX_OPEN_WARNINGS = 3


def run_page(
    name: str,
    *,
    settings: Mapping[str, Any],
    metrics: Metrics,
    validations: Sequence[Row],
    previews: Sequence[Preview] = (),
    note: str = "",
    status: Mapping[str, Any] | None = None,
    resume: str = "",
) -> str:
    """Build the page; sections without data are left out.

    Args:
        name: The run's name.
        settings: As in config.toml, nested.
        metrics: Rows of metrics.jsonl.
        validations: Rows of validation.jsonl.
        previews: Pictures of the steps that are shown.
        note: Shown above the previews.
        status: As in status.json; None for a run of a release without it.
        resume: Command that continues the run.
    """
    shown = _comparable(validations)
    left_out, validations = len(validations) - len(shown), shown
    from_base = settings.get("init_adapter") is None
    sections = [status_banner(status, resume=resume)] if status else []
    if status and status["warnings"]:
        sections.append(_warnings(status["warnings"]))
    sections += [
        tiles(_summary(settings, metrics, validations)),
        section(
            "Loss",
            charts(_loss(metrics), _validation_loss(validations, settings, from_base=from_base)),
        ),
    ]
    if left_out:
        sections.append(
            Raw(
                f"<p>{left_out} earlier rows of validation.jsonl, measured on other clips or with "
                "other settings, are not shown.</p>"
            )
        )
    if previews:
        sections.append(_samples(previews, note, from_base=from_base))
    if validations:
        sections.append(_validation(validations, from_base=from_base))
    sections.append(section("Speed", charts(*_speed(metrics))))
    rows = sorted(_flat(settings))
    sections.append(
        section("Settings", Raw(f"<details><summary>all {len(rows)}</summary>"
                f"{table(['setting', 'value'], rows, sortable=False)}</details>"))
    )  # fmt: skip
    return page(f"Run {name}", sections, script=SCRIPT)


def _warnings(warnings: Sequence[str]) -> Raw:
    items = "".join(f'<p class="warn">{escape(text)}</p>' for text in warnings)
    many = f"{len(warnings)} warning{'s' * (len(warnings) != 1)}"
    opened = " open" * (len(warnings) <= MAX_OPEN_WARNINGS)
    return Raw(f"<details{opened}><summary>{many}</summary>{items}</details>")


def _summary(
    settings: Mapping[str, Any], metrics: Metrics, validations: Sequence[Row]
) -> dict[str, object]:
    last = metrics.last
    held_out = [row for row in validations if row["split"] == "val"]
    summary: dict[str, object] = {
        "steps done": f"{last['step'] + 1:,}" if last else "none yet",
        "loss, smoothed": _figure(last.get("loss_smoothed")),
        "seconds per step": _figure(metrics.median("s_per_step")),
        "clips per second": _figure(metrics.median("clips_per_s")),
        "MFU": _percent(last.get("mfu")),
        "TFLOP/s": _figure(metrics.median("tflops")),
        "waiting for data": _percent((metrics.median("data_wait_pct") or 0) / 100)
        if last
        else None,
        "peak memory": _gigabytes(last.get("peak_memory_gb")),
        "model": settings.get("model"),
        "expert": settings.get("expert"),
    }
    if held_out:
        best = min(held_out, key=lambda row: float(row["mean"]))
        summary["best held-out loss"] = (
            f"{best['mean']:.4f} at step {best['step']:,} ({_change(best)} against the base; "
            f"{conclusion(best.get('ci95'), best.get('num_groups'))})"
            + (", moving average" if best.get("weights") == "ema" else "")
        )
    return {key: value for key, value in summary.items() if value is not None}


def _loss(metrics: Metrics) -> Raw:
    return line_chart(
        "Training loss",
        [
            Line("each step", metrics.curve("loss"), style="faint"),
            Line("smoothed", metrics.curve("loss_smoothed")),
        ],
    )


def _validation_loss(
    validations: Sequence[Row], settings: Mapping[str, Any], *, from_base: bool
) -> Raw:
    """Draw losses and those of the base, from step 0 on: an adapter of zeros is the base."""
    lines = []
    for rows, weights, name, colour in _curves(validations):
        base = [(float(row["step"]), float(row["base_mean"])) for row in rows]
        start = [(0.0, base[0][1])] if from_base and base[0][0] > 0 else []
        band = [
            (float(row["step"]), *(row["base_mean"] + end for end in row["ci95"]))
            for row in rows
            if row.get("ci95")
        ]
        zero = [(0.0, start[0][1], start[0][1])] if start and band else []
        lines.append(Line(name, start + _curve(rows, "mean"), colour, band=zero + band))
        if weights == "adapter":
            lines.append(Line(f"base ({name})", start + base, colour, "dashed"))
    every = dict(_flat(settings)).get("validation.every", "")
    empty = "no validation (validation.every = 0)" if every == "0" else "nothing yet"
    if every.isdecimal() and every != "0":
        empty += f": the first validation is after step {int(every):,}, or at the end of a shorter"
        empty += " run"
    return line_chart(
        "Validation loss of fixed clips, 95 % interval of the difference", lines, empty=empty
    )


def _validation(validations: Sequence[Row], *, from_base: bool) -> Raw:
    """Draw the difference to the base, then the last validation by sigma and activity."""
    differences, by_sigma, samples = [], [], []
    activities: list[list[object]] = []
    for rows, weights, name, colour in _curves(validations):
        band = [(float(row["step"]), *row["ci95"]) for row in rows if row.get("ci95")]
        starts = from_base and rows[0]["step"] > 0
        curve = [(0.0, 0.0)] * starts + _curve(rows, "difference")
        band = [(0.0, 0.0, 0.0)] * (starts and bool(band)) + band
        differences.append(Line(name, curve, colour, band=band))
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


def _speed(metrics: Metrics) -> list[Raw]:
    achieved = (
        line_chart("Model FLOPs utilisation (MFU)", _noisy(metrics, "mfu"), zero=True)
        if metrics.curve("mfu")
        else line_chart("Achieved TFLOP/s", _noisy(metrics, "tflops"), zero=True)
    )
    return [
        line_chart("Learning rate", [Line("lr", metrics.curve("lr"))]),
        line_chart("Gradient norm, before clipping", _noisy(metrics, "grad_norm"), log_y=True),
        line_chart("Seconds per step", _noisy(metrics, "s_per_step"), zero=True),
        line_chart("Clips per second", _noisy(metrics, "clips_per_s"), zero=True),
        line_chart("Waiting for data, % of a step", _noisy(metrics, "data_wait_pct"), zero=True),
        achieved,
        line_chart("Peak memory, GB", [Line("memory", metrics.curve("peak_memory_gb"))], zero=True),
    ]


def _noisy(metrics: Metrics, key: str) -> list[Line]:
    """Values of each step, and their trend once there are enough steps."""
    points, trend = metrics.curve(key), metrics.trend(key)
    return [Line("each step", points, style="faint" if trend else "solid"), Line("mean", trend)]


def _samples(previews: Sequence[Preview], note: str, *, from_base: bool) -> Raw:
    return section(
        "Samples",
        "Approximate pictures: latents through a linear projection to RGB, the same noise at every "
        "step. To decode them: wanlora sample --latents with this run's folder.",
        *([note] if note else []),
        gallery(previews, first_is_base=from_base),
    )


def _curve(rows: Iterable[Row], key: str) -> list[Point]:
    return [(float(row["step"]), float(row[key])) for row in rows]


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _gigabytes(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g} GB"


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
