"""Head of a run's page: the state of the run, its progress, and the script that reloads the page.

Owns: the wording of a state, and when a browser reloads. A page opened from a disk cannot fetch
anything, so it is reloaded as a whole: only if it is visible, nobody is using it, and no video
plays; the scroll positions and open parts stay. Must not know: files, or how a state is found.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from wanlora.core.units import duration
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
        f"<style>{_STYLE}</style>"
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


_STYLE = """
#status { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; background: var(--band); margin-bottom: 14px; }
#status p { max-width: none; overflow-wrap: anywhere; } #status .code { user-select: all; }
progress { width: 100%; height: 8px; accent-color: light-dark(#2563eb, #7aa2ff); }
"""  # noqa: E501

SCRIPT = """
const status = document.querySelector("#status");
const lasting = s => s < 120 ? `${Math.round(s)} s` : s < 7200 ? `${Math.round(s / 60)} min`
  : s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${Math.round(s / 86400)} days`;
for (const time of document.querySelectorAll("time")) {
  const moment = new Date(time.dateTime), today = moment.toDateString() === new Date().toDateString();
  time.title = time.textContent;
  time.textContent = today ? moment.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })
    : moment.toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}
const kept = "wanlora " + location.pathname + location.search;
const scrolled = [...document.querySelectorAll(".strip")], folded = [...document.querySelectorAll("details")];
const place = () => ({ top: scrollY, left: scrolled.map(e => e.scrollLeft), open: folded.map(e => e.open),
  reload: document.querySelector("#reload")?.checked });
const before = (() => { try { return JSON.parse(sessionStorage.getItem(kept)); } catch { return null; } })();
history.scrollRestoration = "manual";
addEventListener("pagehide", () => { try { sessionStorage.setItem(kept, JSON.stringify(place())); } catch {} });
scrolled.forEach((e, i) => { e.scrollLeft = before?.left?.length === scrolled.length ? before.left[i] : e.scrollWidth; });
folded.forEach((e, i) => { if (before?.open?.length === folded.length) e.open = before.open[i]; });
if (before) scrollTo(0, before.top);
if (status) {
  const written = Number(status.dataset.written), age = () => Math.max(0, Date.now() / 1000 - written);
  const live = status.dataset.state === "training", box = document.querySelector("#reload");
  if (box && before?.reload === false) box.checked = false;
  let used = 0;
  for (const kind of ["pointerdown", "pointermove", "wheel", "touchmove", "keydown", "scroll"])
    addEventListener(kind, () => { used = Date.now(); }, { passive: true });
  const idle = () => document.visibilityState === "visible" && Date.now() - used > 3000
    && getSelection().isCollapsed && [...document.querySelectorAll("video")].every(v => v.paused);
  const opened = Date.now(), wait = Math.min(65, Math.max(2, Number(status.dataset.next) + 1 - age()));
  const due = age() > 2 * Number(status.dataset.next) + 10 ? 30 : wait;
  const tick = () => {
    document.querySelector("#age").textContent = ` (${lasting(age())} ago)`;
    if (!live) return;
    const silent = document.querySelector("#silent");
    silent.hidden = age() < SILENT_S;
    if (!silent.hidden) {
      document.querySelector("#left")?.remove();
      Object.assign(document.querySelector("#state"), { textContent: "No sign of life", className: "bad" });
    }
    silent.querySelector("span").textContent = lasting(age());
    if (box.checked && Date.now() - opened > 1000 * due && idle()) location.reload();
  };
  tick();
  setInterval(tick, 1000);
}
""".replace("SILENT_S", str(SILENT_S))  # noqa: E501
