"""The list of runs: one row per run, refreshed in place, with boxes to select runs.

Owns: the markup and script of the list. Must not know: files, or how a state is found.
"""

import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from urllib.parse import quote

from wanlora.commands.watch.live import LIVE, SERVED_POLICY
from wanlora.commands.watch.summary import Best, State, Summary
from wanlora.core.units import count, duration, names
from wanlora.report.asset import asset, style
from wanlora.report.page import Raw, escape, page

MIN_COMPARED, MAX_COMPARED = 2, 8
"""A chart has eight colours."""
REFRESH_S = 5
SCRIPT = LIVE + asset(
    "list_page.js", MIN=MIN_COMPARED, MAX=MAX_COMPARED, REFRESH_MS=1000 * REFRESH_S
)
MAX_NAMED_LINKS = 5

COLOURS: dict[State, str] = {
    "running": "live",
    "finished": "good",
    "stopped": "warn",
    "failed": "bad",
    "no sign of life": "bad",
}
"""State to the class of its badge."""

COLUMNS = (
    "run", "state", "steps", "time left", "loss", "best held-out loss", "rank", "learning rate",
    "started", "last written",
)  # fmt: skip


def list_page(
    folder: str, summaries: Sequence[Summary], *, links: Sequence[str] = (), is_cut: bool = False
) -> str:
    """Build the page.

    Args:
        folder: The watched folder, as the user typed it.
        summaries: In the order of the list.
        links: Symbolic links that were not followed.
        is_cut: The folder was too large to search it all.
    """
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    rows = "\n".join(map(_row, summaries))
    table = (
        '<div class="runs"><table class="sortable"><thead><tr><th aria-label="select"></th>'
        f'{head}</tr></thead>\n<tbody id="runs" data-live>{rows}</tbody></table></div>'
    )
    form = (
        f'<form action="/compare" method="get" id="form">{table}<div class="choose">'
        '<button type="submit">Show side by side</button>'
        f'<span class="soft" id="chosen">select {MIN_COMPARED} to {MAX_COMPARED} runs</span>'
        "</div></form>"
    )
    sections = [
        Raw(style("list_page.css")),
        _counts(folder, summaries, links, is_cut=is_cut),
        Raw(form),
        Raw('<p class="soft" id="fresh">Reload this page for newer numbers.</p>'),
    ]
    return page(f"Runs in {folder}", sections, script=SCRIPT, policy=SERVED_POLICY)


def link_to(name: str) -> Raw:
    """Link to the page of a run."""
    address = f"/run?name={quote(name, safe='', errors='surrogateescape')}"
    return Raw(f'<a href="{address}">{escape(name)}</a>')


def _expert(run: Summary) -> str:
    """Name of the trained expert, after the name of the run; empty for a model with one."""
    return f" <small>{escape(run.expert)}-noise expert</small>" if run.expert else ""


def badge(summary: Summary) -> Raw:
    """State of a run, with the reason below it."""
    shown = f'<span class="badge {COLOURS[summary.state]}">{escape(summary.state)}</span>'
    if summary.reason:
        reason = escape(summary.reason)
        shown += f'<small class="reason" title="{reason}">{reason}</small>'
    return Raw(shown)


def steps(summary: Summary) -> Raw:
    """Steps done, of those planned if known, with a bar."""
    done, planned = summary.steps_done, summary.steps_planned
    if planned is None:
        return Raw(f"{done:,}")
    bar = f'<progress value="{done}" max="{max(planned, 1)}" aria-hidden="true"></progress>'
    return Raw(f"{done:,} of {planned:,}{bar}")


def best_loss(best: Best | None) -> Raw:
    """Held-out loss, and its difference from the base with the interval."""
    if best is None:
        return Raw("")
    colour, interval = "soft", ""
    if best.ci95_pct:
        low, high = best.ci95_pct
        colour = "good" if high < 0 else "bad" if low > 0 else "soft"
        interval = f" ({low:+.1f} to {high:+.1f})"
    return Raw(
        f'{best.loss:.4f}<small class="{colour}" title="best held-out loss, after step '
        f"{best.step:,}; difference from the base model's {best.base_loss:.4f}, 95 % interval\">"
        f"{best.change_pct:+.1f} %{interval}</small>"
    )


def ago(moment: float | None) -> Raw:
    """Time since a moment, with the moment itself under the pointer."""
    if moment is None:
        return Raw("")
    exact = datetime.fromtimestamp(moment, UTC)
    return Raw(
        f'<time datetime="{exact:%Y-%m-%dT%H:%M:%SZ}" title="{exact:%Y-%m-%d %H:%M:%S} UTC">'
        f"{duration(max(0, round(time.time() - moment)))} ago</time>"
    )


def figure(value: float | None, digits: int = 4) -> str:
    """A number with the given number of significant digits; empty for None."""
    return "" if value is None else f"{value:.{digits}g}"


def rate(value: float | None) -> str:
    """A learning rate as it is typed, such as `2.5e-5`; empty for None."""
    if value is None:
        return ""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _counts(
    folder: str, summaries: Sequence[Summary], links: Sequence[str], *, is_cut: bool
) -> Raw:
    """Count runs by state, and name parts of the folder that are not shown."""
    states = Counter(summary.state for summary in summaries)
    by_state = ", ".join(f"{states[state]} {state}" for state in COLOURS if states[state])
    text = f"{count(len(summaries), 'run')}: {by_state}."
    if not summaries:
        text = (
            f"No runs in {folder} yet. A run appears here when it starts: "
            f"wanlora train --output-dir {folder}/NAME"
        )
    if links:
        text += f" Symbolic links are not followed: {names(links, most=MAX_NAMED_LINKS)}."
    if is_cut:
        text += " This folder has too many folders to search them all; watch a smaller one."
    return Raw(f'<p id="counts" data-live>{escape(text)}</p>')


def _row(run: Summary) -> str:
    pick = (
        f'<input type="checkbox" name="run" value="{escape(run.name)}" '
        f'aria-label="select {escape(run.name)}">'
    )
    left = "" if run.eta_s is None else duration(round(run.eta_s))
    loss = run.loss if run.loss_smoothed is None else run.loss_smoothed
    cells = [
        ("", "pick", "", Raw(pick)),
        ("run", "name", run.name, Raw(f"{link_to(run.name)}{_expert(run)}")),
        ("state", "", run.state, badge(run)),
        ("steps", "number", run.steps_done, steps(run)),
        ("time left", "number", run.eta_s, left),
        ("loss", "number", loss, figure(loss)),
        ("best held-out loss", "number", run.best.loss if run.best else None, best_loss(run.best)),
        ("rank", "number", run.rank, run.rank),
        ("learning rate", "number", run.learning_rate, rate(run.learning_rate)),
        ("started", "number", run.started_at, ago(run.started_at)),
        ("last written", "number", run.written_at, ago(run.written_at)),
    ]
    return f"<tr>{''.join(_cell(*cell) for cell in cells)}</tr>"


def _cell(label: str, kind: str, key: object, shown: object) -> str:
    return f'<td class="{kind}" data-label="{label}" data-sort="{escape(key)}">{escape(shown)}</td>'
