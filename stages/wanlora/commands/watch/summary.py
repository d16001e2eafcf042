"""A run in one line: its state, how far it is, and its best result.

Owns: the state of a run, and the cache of what was read. Must not know: HTML, HTTP.

A process that trains holds its run's lock. Not every network disk shares locks between machines, so
a run of another machine also counts as alive while it writes its `status.json` in time.
"""

import socket
import time
from dataclasses import dataclass
from typing import Any, Literal

from wanlora.commands.watch import records
from wanlora.commands.watch.run_files import Folder, Version
from wanlora.runs import run_folder

State = Literal["running", "finished", "stopped", "failed", "no sign of life"]

FILES = (
    run_folder.METRICS_NAME,
    run_folder.VALIDATION_NAME,
    run_folder.CONFIG_NAME,
    run_folder.STATUS_NAME,
)
TAIL_BYTES = 64 * 1024
"""End of metrics.jsonl that is read for its newest row of about 300 bytes."""
PATIENCE_S = 30.0
"""Added to twice the time after which a run writes its status again."""
SILENT_S = 600.0
SILENT_STEPS = 20
"""Without a lock or a status, a run that wrote something in the last 10 minutes, or in the time of
20 steps, counts as alive: a validation or a checkpoint can take that long."""

KILLED = "the process ended without recording why, as after a kill or a power cut"

_ENDED: dict[str, State] = {"done": "finished", "stopped": "stopped", "failed": "failed"}


@dataclass(frozen=True, slots=True)
class Best:
    """The best held-out result of a run.

    Attributes:
        step: Steps done when it was measured.
        loss: Held-out loss.
        base_loss: The base model's, on the same clips and noise.
        change_pct: Difference in percent of `base_loss`; below 0 is better.
        ci95_pct: 95 % interval of `change_pct`; None with a single source group.
        panel: Fingerprint of what was measured; losses of different panels do not compare.
    """

    step: int
    loss: float
    base_loss: float
    change_pct: float
    ci95_pct: tuple[float, float] | None
    panel: str | None


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in one line. Times are seconds since 1970.

    Attributes:
        name: Path relative to the watched folder.
        state: See `State`.
        reason: Signal, error, or why a run has no sign of life.
        steps_done: Optimizer steps.
        steps_planned: None for a run of a release before 0.2.
        eta_s: Seconds left; only of a running run.
        loss: Training loss of the last step.
        loss_smoothed: Moving average of the training loss.
        best: Best held-out result, if any.
        rank: Rank of the adapter.
        expert: Transformer that is trained, of a model with two.
        learning_rate: Learning rate of the last step.
        seconds_per_step: Seconds of the last step.
        started_at: Start of the process that trained last.
        written_at: Last time at which the run wrote metrics, a validation or its status.
    """

    name: str
    state: State
    reason: str | None
    steps_done: int
    steps_planned: int | None
    eta_s: float | None
    loss: float | None
    loss_smoothed: float | None
    best: Best | None
    rank: int | None
    expert: str | None
    learning_rate: float | None
    seconds_per_step: float | None
    started_at: float | None
    written_at: float


@dataclass(frozen=True, slots=True)
class _Read:
    """Values read from one version of a run's files."""

    versions: tuple[Version | None, ...]
    last: dict[str, Any]
    best: Best | None
    settings: dict[str, Any]
    status: dict[str, Any] | None


class Summaries:
    """Summaries of the runs of a folder. Only files that changed are read again. Not for threads.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._known: dict[str, _Read] = {}

    def of(self, names: tuple[str, ...]) -> list[Summary]:
        """Summarise runs, the last written first; runs that have vanished are left out."""
        self._known = {name: self._known[name] for name in names if name in self._known}
        found = [self._summary(name) for name in names]
        kept = [summary for summary in found if summary]
        return sorted(kept, key=lambda summary: (-summary.written_at, summary.name))

    def _summary(self, name: str) -> Summary | None:
        versions = tuple(self._folder.version(f"{name}/{file}") for file in FILES)
        times = [version.mtime_ns / 1e9 for version in versions if version]
        if not times:
            return None
        known = self._known.get(name)
        if known is None or known.versions != versions:
            known = self._known[name] = self._read(name, versions)
        return _summary(
            name, known, written_at=max(times), locked=self._folder.is_locked(name),
            is_saved=self._is_saved(name, known),
        )  # fmt: skip

    def _read(self, name: str, versions: tuple[Version | None, ...]) -> _Read:
        tail = self._folder.read_end(f"{name}/{run_folder.METRICS_NAME}", TAIL_BYTES) or b""
        validations = self._folder.read(f"{name}/{run_folder.VALIDATION_NAME}") or b""
        best = records.best_held_out(records.validation_rows(validations).rows)
        return _Read(
            versions=versions,
            last=records.last_metrics(tail) or {},
            best=describe_best(best) if best else None,
            settings=records.settings(self._folder.read(f"{name}/{run_folder.CONFIG_NAME}")),
            status=records.status(self._folder.read(f"{name}/{run_folder.STATUS_NAME}")),
        )

    def _is_saved(self, name: str, known: _Read) -> bool:
        """Return whether a run without a status has a checkpoint of its last step."""
        if known.status or not known.last:
            return False
        folders = self._folder.folders(f"{name}/{run_folder.CHECKPOINTS_NAME}")
        return f"step-{known.last['step'] + 1:06d}" in folders


def describe_best(row: records.Row) -> Best:
    """Convert a row of validation.jsonl."""
    base = float(row["base_mean"])
    ends = row.get("ci95")
    return Best(
        step=int(row["step"]),
        loss=float(row["mean"]),
        base_loss=base,
        change_pct=100 * float(row["difference"]) / base,
        ci95_pct=(100 * ends[0] / base, 100 * ends[1] / base) if ends else None,
        panel=row.get("panel"),
    )


def state_of(
    status: records.Row | None,
    *,
    locked: bool | None,
    now: float,
    written_at: float,
    seconds_per_step: float | None,
    is_complete: bool,
    is_saved: bool,
) -> tuple[State, str | None]:
    """Decide the state of a run, and the reason for it.

    Args:
        status: As in status.json; None for a run of a release before 0.2.
        locked: From `Folder.is_locked`. False counts only for a run of this machine.
        now: Time, s since 1970.
        written_at: Time at which the run wrote something.
        seconds_per_step: Seconds of the last step, if known.
        is_complete: No step is left after the last one; only used without a status.
        is_saved: There is a checkpoint of the last step; only used without a status.
    """
    if locked:
        return "running", None
    if status and status["state"] in _ENDED:
        return _ENDED[status["state"]], status.get("reason")
    if status:
        is_here = locked is False and status.get("host") == socket.gethostname()
        wait_s = status.get("next_write_s")
        due_s = wait_s if records.is_number(wait_s) else SILENT_S
        if not is_here and now - status["written_at"] <= 2 * due_s + PATIENCE_S:
            return "running", None
        return "no sign of life", KILLED
    limit_s = max(SILENT_S, SILENT_STEPS * (seconds_per_step or 0.0))
    if locked is None and now - written_at <= limit_s:
        return "running", None
    if is_complete:
        return "finished", None
    return ("stopped", None) if is_saved else ("no sign of life", KILLED)


def _summary(
    name: str, read: _Read, *, written_at: float, locked: bool | None, is_saved: bool
) -> Summary:
    last, status = read.last, read.status
    now = time.time()
    state, reason = state_of(
        status,
        locked=locked,
        now=now,
        written_at=written_at,
        seconds_per_step=last.get("s_per_step"),
        is_complete=last.get("eta_s") == 0,
        is_saved=is_saved,
    )
    done = last["step"] + 1 if last else 0
    eta_s = last.get("eta_s") if state == "running" else None
    lora = read.settings.get("lora")
    rank = lora.get("rank") if isinstance(lora, dict) else None
    expert = read.settings.get("expert")
    return Summary(
        name=name,
        state=state,
        reason=reason if isinstance(reason, str) else None,
        steps_done=done,
        steps_planned=_planned(status, done, is_complete=last.get("eta_s") == 0),
        eta_s=max(0.0, eta_s - (now - written_at)) if eta_s is not None else None,
        loss=last.get("loss"),
        loss_smoothed=last.get("loss_smoothed"),
        best=read.best,
        rank=rank if isinstance(rank, int) else None,
        expert=expert if isinstance(expert, str) else None,
        learning_rate=last.get("lr"),
        seconds_per_step=last.get("s_per_step"),
        started_at=status["started_at"] if status else None,
        written_at=written_at,
    )


def _planned(status: records.Row | None, done: int, *, is_complete: bool) -> int | None:
    if status:
        return int(status["steps_planned"])
    return done if is_complete else None
