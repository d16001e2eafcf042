"""Head of a run's page: the state of the run, its progress, and the script that reloads the page.

Owns: the wording of a state, and when a browser reloads. A page opened from a disk cannot fetch
anything, so it is reloaded as a whole: only if it is visible, it is not in use, and no video
plays; the scroll positions and open parts stay. Must not know: files, or how a state is found.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from wanlora.core.units import duration
from wanlora.report.asset import asset, style
from wanlora.report.page import Raw, escape

TRAINING, DONE, STOPPED, FAILED = "training", "done", "stopped", "failed"
_HEADINGS = {
    TRAINING: ("Training", "good"),
    DONE: ("Done", "good"),
    STOPPED: ("Stopped", "warn"),
    FAILED: ("Failed", "bad"),
}
SILENT_S = 300
"""Age in seconds of the page of a live run from which the page reports that the run is silent."""
SCRIPT = asset("run_status.js", SILENT_S=SILENT_S)


def status_banner(status: Mapping[str, Any], *, resume: str) -> Raw:
    """Draw the state, a bar of the steps done, the time left and the age of the page.

    Args:
        status: As in status.json.
        resume: Command that continues the run.
    """
    done, planned = status["steps_done"], status["steps_planned"]
    heading, colour = _HEADINGS[status["state"]]
    share = f" ({100 * done / planned:.0f} %)" if planned else ""
    left = ""
    if status["state"] == TRAINING and status.get("eta_s") is not None:
        left = (
            f'<span id="left">, about {duration(status["eta_s"])} left '
            f"(until {_time(status['written_at'] + status['eta_s'])})</span>"
        )
    reason = f'<p class="{colour}">{escape(status["reason"])}</p>' if status.get("reason") else ""
    lines = [
        f'<p class="verdict"><b id="state" class="{colour}">{heading}</b> step {done:,} of '
        f"{planned:,}{share}{left}</p>",
        f'<progress value="{done}" max="{max(planned, 1)}" aria-label="steps done"></progress>',
        reason,
        f'<p class="soft">started {_time(status["started_at"])}, written '
        f'{_time(status["written_at"])}<span id="age"></span>{_checkpoint(status)}</p>',
    ]
    if status["state"] in (STOPPED, FAILED):
        lines.append(f'<p>To continue: <span class="code">{escape(resume)}</span></p>')
    live = ""
    if status["state"] == TRAINING:
        lines.append(
            f'<p class="bad" id="silent" hidden>This page was not written for <span></span>. The '
            f"process of this run has probably ended without a report: it was killed, or the "
            f'machine stopped. To continue: <span class="code">{escape(resume)}</span></p>'
            '<p class="soft"><label><input type="checkbox" id="reload" checked> reload this page '
            "while the run lives</label></p>"
        )
        live = f' data-next="{status["next_write_s"]:.0f}"'
    return Raw(
        f"{style('run_status.css')}"
        f'<section id="status" data-state="{status["state"]}" '
        f'data-written="{status["written_at"]:.0f}"{live}>{"".join(lines)}</section>'
    )


def _checkpoint(status: Mapping[str, Any]) -> str:
    found = status.get("checkpoint")
    if not found:
        return ", no checkpoint yet" if status["state"] == TRAINING else ""
    return f", newest checkpoint: step {found['step']:,}, {_time(found['written_at'])}"


def _time(seconds: float) -> str:
    """Moment in UTC; the script shows it in the reader's time zone."""
    moment = datetime.fromtimestamp(seconds, UTC)
    return f'<time datetime="{moment:%Y-%m-%dT%H:%M:%SZ}">{moment:%Y-%m-%d %H:%M} UTC</time>'
