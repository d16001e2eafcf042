"""Stage two's loop, top to bottom: read, predict, accumulate, check, step, record, save.

Owns: the order of operations in a step. `opening` checks and builds everything before; the numerics
are in `training.flow`, `predict` and `masters`.
"""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wanlora import progress
from wanlora.commands.train import previewing, saving, validating
from wanlora.commands.train.reporting import Reporter
from wanlora.commands.train.saving import SaveTimer
from wanlora.commands.train.session import Session, TrainedModel
from wanlora.commands.train.start_log import log_expectation
from wanlora.commands.train.step_errors import explain_memory, non_finite, suspect_kernel
from wanlora.commands.train.train_result import TrainResult, result_of
from wanlora.core.out_of_memory import explained_out_of_memory
from wanlora.processes.signals import StopRequest, stop_on_signals
from wanlora.runs import claim, publish
from wanlora.runs.page import LivePage, live_page
from wanlora.training import flow, schedule
from wanlora.training.batches import MicroBatch, read_ahead
from wanlora.training.outcomes import Outcomes
from wanlora.training.predict import predict
from wanlora.wan import attention

logger = logging.getLogger(__name__)


def train(session: Session, warnings: list[str]) -> TrainResult:
    """Train to the last step, or to a signal or reason to stop.

    Args:
        session: The run.
        warnings: Warnings so far, for the run's page; may grow.

    Raises:
        WanloraError: A loss or gradient is not finite, memory runs out, or another process of the
            run is lost.
    """
    model, data, run, ranks = session.model, session.data, session.run, session.ranks
    masters, optimizer, done = model.masters, model.optimizer, run.progress
    first_step = done.step
    if ranks.is_main:
        log_expectation(session)
    steps = range(first_step, run.end_step)
    learning_rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        partial(
            schedule.multiplier,
            schedule=run.schedule,
            warmup_steps=run.warmup_steps,
            num_steps=run.end_step,
        ),
        last_epoch=first_step - 1,
    )
    order = ((step, slots) for step in steps for slots in session.micro_batches(step))
    outcomes = Outcomes(model.device, ranks.count)
    started, stopped = time.perf_counter(), None
    with (
        # The outermost block: process 0 may still be saving when the others have left the loop.
        stop_on_signals(_log_stop, ends_process=True) as stop,
        ranks.explained(),
        _begin(session, warnings) as page,
        explained_out_of_memory(partial(explain_memory, run.folder, done, session.step_plan.trial)),
        attention.pinned(model.kernel.name, model.device),
        closing(
            read_ahead(data.source, order, depth=session.step_plan.prefetch, device=model.device)
        ) as batches,
        closing(Reporter(session, page)) as reporter,
        _bar(session) as bar,
    ):
        _restore_best(session)
        if validating.is_due(run):  # a signal ended the run before it
            stopped = _validate(session, reporter, stop)
        if not stopped:
            previewing.preview_at_start(session, reporter, stop.number)
        outcomes.start()
        timer = SaveTimer(run.saving.every_minutes if ranks.is_main else 0)
        for step in () if stopped else steps:
            waited_s, slot_losses = 0.0, []
            for _ in session.micro_batches(step):
                batch, wait_s = _next(batches)
                waited_s += wait_s
                losses = _losses(model, batch)
                # Divided by the global batch once: the sum over slots and ranks is then the mean.
                torch.autograd.backward(losses.sum() / data.num_clips(step))
                masters.accumulate()
                slot_losses.append(losses.detach())
            if ranks.count > 1:
                ranks.barrier()  # names a lost process; the collective would wait for it
                masters.sum_over_ranks()
            grad_norm = masters.clip(model.max_grad_norm)
            values = outcomes.gather(
                torch.cat(slot_losses), grad_norm, stop.signal, save=timer.is_due()
            )
            # The optimizer gets zeros instead of NaN, in a step that is never saved: the run stops
            # when the NaN has arrived at this process.
            masters.clear_gradient_if(~torch.isfinite(values).all())
            optimizer.step()
            masters.zero_grad()
            masters.publish()
            if model.average:
                model.average.update()
            done.step = step + 1
            rate = learning_rate.get_last_lr()[0]
            outcomes.note(step, values, learning_rate=float(rate), waited_s=waited_s)
            learning_rate.step()

            stopped = _follow_up(session, reporter, outcomes, bar, timer, stop)
            if stopped:
                break
        reporter.finish(stopped)
        ranks.barrier()
        ranks.close()
    seconds = time.perf_counter() - started
    return result_of(session, reporter, first_step=first_step, stopped=stopped, seconds=seconds)


def _follow_up(
    session: Session,
    reporter: Reporter,
    outcomes: Outcomes,
    bar: Any,
    timer: SaveTimer,
    stop: StopRequest,
) -> str | None:
    """Record the steps that have arrived, then do what is due; return a reason to stop, or None."""
    run = session.run
    by_steps = saving.is_due(run, session.data.source.order.steps_per_epoch)
    interrupted = stop.signal is not None and session.ranks.count == 1
    pausing = interrupted or validating.is_due(run) or previewing.is_due(run) or by_steps
    stopping, by_time = _record(session, reporter, outcomes, all_of_them=pausing)
    if (stopping or by_time) and not pausing:
        newest, _ = _record(session, reporter, outcomes, all_of_them=True)
        stopping, pausing = stopping or newest, True
    if session.ranks.is_main:
        progress.show_figures(bar, *reporter.figures())
        bar.update()
        # Before the validation: an error or a signal there loses no step.
        if stopping or by_steps or by_time:
            saving.save(session.model, run)
            timer.restart()
    if not stopping and validating.is_due(run):
        stopping = _validate(session, reporter, stop)
    if not stopping and previewing.is_due(run):
        previewing.make_previews(session, reporter, stop.number)
    if pausing:
        outcomes.start()
    return stopping


def _validate(session: Session, reporter: Reporter, stop: StopRequest) -> str | None:
    """Validate, and record it in the checkpoint of this step; return a reason to stop, or None."""
    stopping = validating.validate(session, reporter, stop.number)
    if session.ranks.is_main and not saving.add_validation(session.run) and stopping:
        saving.save(session.model, session.run)
    return stopping


def _log_stop(received: signal.Signals) -> None:
    """Log the request in a thread: the signal may have interrupted a write to the same stream."""
    message = "%s: saving after this step, then stopping"
    threading.Thread(target=logger.warning, args=(message, received.name)).start()


@contextmanager
def _begin(session: Session, warnings: list[str]) -> Iterator[LivePage | None]:
    """Lock the run's folder and write its first files, after all checks."""
    run = session.run
    if not session.ranks.is_main:
        yield None
        return
    facts = {**run.facts, "attention": session.model.kernel.describe()}
    with claim.begin_run(run.folder, run.settings, facts, checkpoint=run.checkpoint):
        validated = not validating.is_due(run)
        publish.remove_after(run.folder, run.progress.step, validated=validated)
        if run.checkpoint:
            saving.copy_adapters(run.folder, run.checkpoint)
        else:
            publish.remove_attempt(run.folder)
        with live_page(run.folder, steps_planned=run.end_step, warnings=warnings) as page:
            yield page


def _restore_best(session: Session) -> None:
    """Reconcile `best/`, and send the progress to all processes: it decides when they stop."""
    run = session.run
    restored = session.ranks.from_main(
        lambda: saving.restore_best(
            run.folder, run.checkpoint, run.progress, run.validation.panel_keys.get("val")
        )
    )
    vars(run.progress).update(vars(restored))


def _losses(model: TrainedModel, batch: MicroBatch) -> Tensor:
    """Weighted loss of each clip of a micro-batch."""
    prediction, target = predict(model.transformer, batch, model.device, model.dtype)
    losses = flow.loss_per_clip(prediction, target)
    return losses * batch.weights.to(losses.device)


def _next(batches: Iterator["Future[MicroBatch]"]) -> tuple[MicroBatch, float]:
    """Return the next micro-batch, and the seconds that the step waited for it."""
    started = time.perf_counter()
    batch = next(batches).result()
    return batch.wait(), time.perf_counter() - started


def _record(
    session: Session, reporter: Reporter, outcomes: Outcomes, *, all_of_them: bool
) -> tuple[str | None, bool]:
    """Record the steps whose outcome has arrived; return the requests of all processes.

    Returns:
        Name of the signal that requests a stop, or None; and whether a checkpoint is requested.
    """
    stopping, saving_now = None, False
    for outcome in outcomes.arrived(all_of_them=all_of_them):
        if not outcome.is_finite:
            model, operators = session.model, session.step_plan.trial.attention
            advice = suspect_kernel(session.run.folder, model.kernel.name, operators, model.device)
            raise non_finite(outcome, session.data, advice)
        reporter.step(outcome)
        stopping = outcome.stop.name if outcome.stop else stopping
        saving_now |= outcome.save
    return stopping, saving_now


def _bar(session: Session) -> AbstractContextManager[Any]:
    return progress.bar(
        total=session.run.end_step, done=session.run.progress.step, description="train",
        unit="step", shown=session.ranks.is_main,
    )  # fmt: skip
