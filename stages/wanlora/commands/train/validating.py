"""Validation of a run while it trains: the schedule, the best adapter, and the early stop.

Owns: the choice of the best adapter, and the rule that a validation stops the run.
`training.validation` measures the losses, and `reporting` records them.
"""

import logging
import signal
import time
from collections.abc import Mapping
from contextlib import nullcontext

from wanlora.commands.train import saving
from wanlora.commands.train.advice import warn_of_overfitting
from wanlora.commands.train.reporting import Reporter
from wanlora.commands.train.session import Run, Session
from wanlora.files import write_json
from wanlora.runs import run_folder
from wanlora.training.panel import Report
from wanlora.training.validation import (
    ADAPTER,
    EMA,
    Panel,
    StopSignal,
    ValidationStopped,
    describe,
    measure,
    record,
)

logger = logging.getLogger(__name__)


def is_due(run: Run) -> bool:
    """Return whether to validate now; a run that continues also makes up for a skipped one."""
    every, progress = run.validation.every, run.progress
    done = progress.step
    if not every or not done or done == progress.validated_step:
        return False
    return done % every == 0 or done == run.end_step


def validate(session: Session, reporter: Reporter, stop: StopSignal) -> str | None:
    """Measure the panels, keep the best adapter, and record both.

    Args:
        session: The run.
        reporter: Records the rows.
        stop: Returns the number of a signal that requests a stop, or 0.

    Returns:
        A reason to stop the run, or None.
    """
    run = session.run
    try:
        reports = _measure_all(session, stop)
    except ValidationStopped as request:
        return signal.Signals(request.signal_number).name
    if session.ranks.is_main:
        for panel, weights, report in reports:
            key = run.validation.panel_keys[panel.name]
            row = record(run.progress.step, panel, report, key=key, weights=weights)
            reporter.record_validation(row)
    run.progress.validated_step = run.progress.step
    held_out = {weights: report.mean for panel, weights, report in reports if panel.name == "val"}
    if held_out:
        _note_best(session, held_out)
    if session.ranks.is_main:
        rows = run_folder.read_rows(run.folder, run_folder.VALIDATION_NAME)
        warn_of_overfitting(rows, run.validation.panel_keys, best_step=run.progress.best_step)
        reporter.renew_page()
    patience = run.validation.patience
    if held_out and patience and run.progress.stale >= patience:
        return run_folder.out_of_patience(patience)
    return None


def _measure_all(session: Session, stop: StopSignal) -> list[tuple[Panel, str, Report]]:
    """Measure all panels; held-out clips also with the moving average, if there is one."""
    started = time.perf_counter()
    # The overfitting check compares both panels on the weights being trained.
    both = (EMA, ADAPTER) if session.model.average else (ADAPTER,)
    reports = [
        (panel, weights, _measure(session, panel, weights, stop))
        for panel in session.data.panels
        for weights in (both if panel.name == "val" else (ADAPTER,))
    ]
    if session.ranks.is_main:
        logger.info(
            "validation after step %d took %.1f s for %d forward passes",
            session.run.progress.step - 1, time.perf_counter() - started,
            sum(len(panel.clips) * len(panel.sigmas) for panel, _, _ in reports),
        )  # fmt: skip
    return reports


def _measure(session: Session, panel: Panel, weights: str, stop: StopSignal) -> Report:
    model, plan, ranks = session.model, session.run.validation, session.ranks
    average = model.average if weights == EMA else None
    assert average or weights == ADAPTER
    with model.masters.replaced_by(average.tensors) if average else nullcontext():
        report = measure(
            panel,
            model.transformer,
            session.data.source,
            plan.base_losses,
            key=plan.panel_keys[panel.name],
            device=model.device,
            dtype=model.dtype,
            rank=ranks.index,
            num_ranks=ranks.count,
            stop=stop,
            barrier=ranks.barrier,
        )
    if ranks.is_main:  # now, so the base is not measured again after a stop
        write_json(session.run.folder / run_folder.BASE_LOSSES_NAME, plan.base_losses)
        logger.info("%s", describe(panel, report, weights=weights))
    return report


def _note_best(session: Session, held_out: Mapping[str, float]) -> None:
    """Keep the weights of the lowest loss, if it is lower than all before."""
    progress = session.run.progress
    weights = min(held_out, key=lambda name: (held_out[name], name))
    if progress.best_loss is not None and held_out[weights] >= progress.best_loss:
        progress.stale += 1
        return
    progress.best_step, progress.best_loss = progress.step, held_out[weights]
    progress.best_weights, progress.stale = weights, 0
    if session.ranks.is_main:
        saving.save_best(session.model, session.run, weights)
