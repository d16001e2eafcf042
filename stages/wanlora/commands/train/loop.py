"""Stage two's loop, top to bottom: read, predict, accumulate, refuse, step, record, save.

Owns: the order of things in a step. What is checked and built before is in `session`, the numerics
in `training.flow`, `predict`, `masters` and `adapters`.
"""

import logging
import math
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanlora import progress
from wanlora.commands.train import saving
from wanlora.commands.train.opening import log_expectation
from wanlora.commands.train.reporting import Reporter, validation_is_due
from wanlora.commands.train.resume import recorded_settings
from wanlora.commands.train.saving import SaveTimer
from wanlora.commands.train.session import Session, open_session
from wanlora.config import TrainConfig
from wanlora.core import units
from wanlora.core.intervals import conclusion
from wanlora.core.out_of_memory import explained_out_of_memory
from wanlora.cost.seconds import all_reduce_bytes
from wanlora.errors import NonFiniteError
from wanlora.processes.signals import stop_on_signals
from wanlora.runs import claim, publish, run_folder
from wanlora.runs.checkpoints import Progress
from wanlora.runs.page import LivePage, collected_warnings, live_page
from wanlora.runs.record import check_trackers
from wanlora.store.views import View
from wanlora.training import flow, schedule
from wanlora.training.batches import MicroBatch, read_ahead
from wanlora.training.outcomes import Outcome, Outcomes
from wanlora.training.pace import tried_seconds
from wanlora.training.predict import predict
from wanlora.training.validation import EMA
from wanlora.training.workload import Trial, describe
from wanlora.wan import attention

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a run made.

    Attributes:
        sent_bytes_per_step: By each process, to sum the adapter's gradient over all of them.
        stopped: Why it ended before its last step: a signal's name, "no new best", or None.
        validation: The last held-out report of the adapter, as in validation.jsonl.
        best: The held-out report of the adapter in `best/`; its `weights` are `adapter` or `ema`.
    """

    output_dir: str
    adapter: str
    steps: int
    resumed_from: int
    trainable_parameters: int
    last_loss: float | None
    seconds: float
    seconds_per_step: float | None
    num_processes: int
    sent_bytes_per_step: int
    clips_per_s: float | None
    stopped: str | None
    best_step: int | None
    validation: dict[str, Any] | None
    best: dict[str, Any] | None

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal's number, as shells have it."""
        return {"SIGINT": 130, "SIGTERM": 143}.get(self.stopped or "", 0)

    def lines(self) -> list[str]:
        """Format the result and the next command."""
        lines = [f"{self.output_dir} is already at step {self.steps}; nothing was trained"]
        if self.last_loss is not None:
            lines = [
                f"trained steps {self.resumed_from} to {self.steps - 1} in {self.seconds:.1f} s "
                f"({self.seconds_per_step:.3f} s/step, {self.clips_per_s:.2f} clips/s), "
                f"last loss {self.last_loss:.4f}"
            ]
        if self.stopped:
            go_on = run_folder.resume_command(Path(self.output_dir))
            lines.append(f"stopped early: {self.stopped}; continue with: {go_on}")
        if self.best:
            change = 100 * self.best["difference"] / self.best["base_mean"]
            found = conclusion(self.best["ci95"], self.best.get("num_groups"))
            lines.append(
                f"best held-out loss after {self.best['step']} steps"
                f"{' (moving average)' if self.best['weights'] == EMA else ''}: "
                f"{self.best['mean']:.4f}, {change:+.2f} % against the base ({found}): "
                f"{self.output_dir}/best"
            )
        return [
            *lines,
            f"adapter: {self.adapter}",
            f'next: wanlora sample --adapter {self.output_dir} --prompt "..."',
            "for ComfyUI, which does not read this file: wanlora export --adapter "
            f"{self.output_dir} --format comfyui --output "
            f"{Path(self.output_dir).resolve().name}.safetensors",
        ]


def run(config: TrainConfig, view: View) -> TrainResult:
    """Train, or continue, the run in `config.output_dir`.

    Raises:
        WanloraError: Anything that makes the run impossible or pointless, before the first step;
            a non-finite loss or gradient, before the optimizer steps on it; another process of
            the run that is lost.
    """
    check_trackers(config.trackers)
    with collected_warnings() as warnings:
        return _train(config, open_session(config, view), warnings)


def _train(config: TrainConfig, session: Session, warnings: list[str]) -> TrainResult:
    masters, optimizer, done = session.masters, session.optimizer, session.progress
    first_step = done.step
    if session.is_main:
        log_expectation(
            config, tried_seconds(session.work, session.trial, session.slots),
            session.data.source.order.bucket_steps_per_epoch,
            num_steps=session.end_step - first_step, preview_every=session.preview_every,
        )  # fmt: skip
    steps = range(first_step, session.end_step)
    learning_rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        partial(
            schedule.multiplier,
            schedule=config.optimizer.schedule,
            warmup_steps=session.warmup_steps,
            num_steps=session.end_step,
        ),
        last_epoch=first_step - 1,
    )
    plan = ((step, slots) for step in steps for slots in session.slots[session.bucket(step)])
    outcomes = Outcomes(session.device, session.ranks.count)
    started, stopped = time.perf_counter(), None
    with (
        # The outermost block: process 0 may still be saving when the others have left the loop.
        stop_on_signals(_log_stop, ends_process=True) as stop,
        session.ranks.explained(),
        _begin(config, session, warnings) as page,
        explained_out_of_memory(
            partial(_explain_memory, config.output_dir, session.progress, session.trial)
        ),
        attention.pinned(config.attention, session.device),
        closing(
            read_ahead(
                session.data.source, plan, depth=config.prefetch_batches, device=session.device
            )
        ) as batches,
        closing(Reporter(config, session, lambda: int(stop.signal or 0), page)) as reporter,
        _bar(session) as bar,
    ):
        _restore_best(config, session)
        if reporter.validation_is_due():  # a signal ended the run before it
            stopped = _validate(config, session, reporter)
        if not stopped:
            reporter.preview_at_start()
        outcomes.start()
        timer = SaveTimer(config.save_minutes if session.is_main else 0)
        for step in () if stopped else steps:
            waited_s, slot_losses = 0.0, []
            for _ in session.slots[session.bucket(step)]:
                batch, wait_s = _next(batches)
                waited_s += wait_s
                losses = _losses(session, batch)
                # Divided by the global batch once: the sum over slots and ranks is then the mean.
                torch.autograd.backward(losses.sum() / session.num_clips(step))
                masters.accumulate()
                slot_losses.append(losses.detach())
            if session.ranks.count > 1:
                session.ranks.barrier()  # names a lost one, where the collective would wait for it
                masters.sum_over_ranks()
            grad_norm = masters.clip(config.optimizer.max_grad_norm)
            values = outcomes.gather(
                torch.cat(slot_losses), grad_norm, stop.signal, save=timer.is_due()
            )
            # The optimizer sees zeros for a NaN, in a step that is never kept: the run stops when
            # this process comes to know of it.
            masters.refuse(~torch.isfinite(values).all())
            optimizer.step()
            masters.zero_grad()
            masters.publish()
            if session.average:
                session.average.update()
            done.step = step + 1
            rate = learning_rate.get_last_lr()[0]
            outcomes.note(step, values, learning_rate=float(rate), waited_s=waited_s)
            learning_rate.step()

            interrupted = stop.signal is not None and session.ranks.count == 1
            stopped = _follow_up(
                config, session, reporter, outcomes, bar, timer, pausing=interrupted
            )
            if stopped:
                break
        reporter.finish(stopped)
        session.ranks.barrier()
        session.ranks.close()
    return _result(config, session, reporter, first_step, stopped, time.perf_counter() - started)


def _follow_up(
    config: TrainConfig,
    session: Session,
    reporter: Reporter,
    outcomes: Outcomes,
    bar: Any,
    timer: SaveTimer,
    *,
    pausing: bool,
) -> str | None:
    """Record what has arrived, and pause for what is due after a step; return a reason to stop."""
    by_steps = saving.is_due(config, session)
    pausing |= reporter.is_due() or by_steps
    stopping, by_time = _report(config, session, reporter, outcomes, all_of_them=pausing)
    if (stopping or by_time) and not pausing:
        newest, _ = _report(config, session, reporter, outcomes, all_of_them=True)
        stopping, pausing = stopping or newest, True
    if session.is_main:
        progress.show_figures(bar, *reporter.figures())
        bar.update()
        # Before the validation: what fails or stops there loses no step.
        if stopping or by_steps or by_time:
            saving.save(config, session)
            timer.restart()
    if not stopping and reporter.validation_is_due():
        stopping = _validate(config, session, reporter)
    if not stopping:
        reporter.preview_if_due()
    if pausing:
        outcomes.start()
    return stopping


def _validate(config: TrainConfig, session: Session, reporter: Reporter) -> str | None:
    """Validate, and record it in the checkpoint of this step; return a reason to stop, if any."""
    stopping = reporter.validate()
    if session.is_main and not saving.add_validation(config, session) and stopping:
        saving.save(config, session)
    return stopping


def _log_stop(received: signal.Signals) -> None:
    """Log the request in a thread: the signal may have interrupted a write to the same stream."""
    message = "%s: saving after this step, then stopping"
    threading.Thread(target=logger.warning, args=(message, received.name)).start()


@contextmanager
def _begin(config: TrainConfig, session: Session, warnings: list[str]) -> Iterator[LivePage | None]:
    """Take the run's folder into possession, now that nothing can be refused any more."""
    if not session.is_main:
        yield None
        return
    settings = recorded_settings(config)
    settings["optimizer"]["warmup_steps"] = session.warmup_steps
    with claim.begin_run(config.output_dir, settings, session.facts, checkpoint=session.checkpoint):
        validated = not validation_is_due(config, session)
        publish.forget_after(config.output_dir, session.progress.step, validated=validated)
        if session.checkpoint:
            saving.show(config.output_dir, session.checkpoint)
        else:
            publish.forget_attempt(config.output_dir)
        with live_page(
            config.output_dir, steps_planned=session.end_step, warnings=warnings
        ) as page:
            yield page


def _restore_best(config: TrainConfig, session: Session) -> None:
    """Agree on what was best so far; every process decides by it when to stop."""
    held_out = session.data.held_out
    restored = session.ranks.from_main(
        lambda: saving.restore_best(
            config.output_dir, session.checkpoint, session.progress,
            session.panel_keys["val"] if held_out else None,
        )
    )  # fmt: skip
    vars(session.progress).update(vars(restored))


def _explain_memory(run_dir: Path, done: Progress, trial: Trial, reason: str) -> str:
    """Explain how to continue a run whose memory ran out although the largest bucket fitted."""
    return (
        f"out of memory after {done.step} steps with activations {describe(trial.modes)}: "
        f"{reason} Saved checkpoints are complete: continue with "
        f"{run_folder.resume_command(run_dir)} "
        "--activations selective (or full), or stop other programs that use this memory"
    )


def _losses(session: Session, batch: MicroBatch) -> Tensor:
    """Weighted loss of each clip of a micro-batch."""
    prediction, target = predict(session.transformer, batch, session.device, session.dtype)
    losses = flow.loss_per_clip(prediction, target)
    return losses * batch.weights.to(losses.device)


def _next(batches: Iterator["Future[MicroBatch]"]) -> tuple[MicroBatch, float]:
    """Take the next micro-batch, and say how long the step had to wait for it, in seconds."""
    started = time.perf_counter()
    batch = next(batches).result()
    return batch.wait(), time.perf_counter() - started


def _report(
    config: TrainConfig,
    session: Session,
    reporter: Reporter,
    outcomes: Outcomes,
    *,
    all_of_them: bool,
) -> tuple[str | None, bool]:
    """Record the steps whose outcome is here; return the requests of all processes."""
    stopping, saving_now = None, False
    for outcome in outcomes.arrived(all_of_them=all_of_them):
        if not outcome.is_finite:
            raise _non_finite(config, session, outcome)
        reporter.step(outcome)
        stopping = outcome.stop.name if outcome.stop else stopping
        saving_now |= outcome.save
    return stopping, saving_now


def _non_finite(config: TrainConfig, session: Session, outcome: Outcome) -> NonFiniteError:
    """Name the step and clips that a NaN came from; nothing of that step was or will be kept."""
    bad = [slot for slot, loss in enumerate(outcome.losses) if not math.isfinite(loss)]
    source = session.data.source
    slots = [source.describe(outcome.step, slot) for slot in bad or range(len(outcome.losses))]
    return NonFiniteError(
        f"step {outcome.step}: the {'loss' if bad else 'gradient'} is not finite "
        f"(gradient norm {outcome.grad_norm}); nothing of this step was saved. Clips: "
        + units.names(slots, most=4, separator="; ")
        + ". If the learning rate is too high, start again in another --output-dir with a lower "
        "--learning-rate; to see whether these clips are damaged: wanlora inspect "
        f"{shlex.quote(str(config.cache))} --verify" + _blame_kernel(config, session)
    )


def _blame_kernel(config: TrainConfig, session: Session) -> str:
    """Name the attention kernel of a GPU as a suspect: backward passes of some have had NaN."""
    if session.device.type != "cuda":
        return ""
    return (
        f". If neither is the cause, another attention kernel may help (this one: "
        f"{', '.join(session.trial.attention)}): {run_folder.resume_command(config.output_dir)} "
        f"{attention.use_another(config.attention, session.device)}"
    )


def _bar(session: Session) -> AbstractContextManager[Any]:
    return progress.bar(
        total=session.end_step, done=session.progress.step, description="train", unit="step",
        shown=session.is_main,
    )  # fmt: skip


def _result(
    config: TrainConfig,
    session: Session,
    reporter: Reporter,
    first_step: int,
    stopped: str | None,
    seconds: float,
) -> TrainResult:
    num_done = session.progress.step - first_step
    return TrainResult(
        output_dir=str(config.output_dir),
        adapter=str(config.output_dir / run_folder.ADAPTER_NAME),
        steps=session.progress.step,
        resumed_from=first_step,
        trainable_parameters=session.masters.flat_gradient.numel(),
        last_loss=reporter.last_loss,
        seconds=seconds,
        seconds_per_step=seconds / num_done if num_done else None,
        num_processes=session.ranks.count,
        sent_bytes_per_step=all_reduce_bytes(
            session.masters.flat_gradient.numel(), session.ranks.count
        ),
        clips_per_s=reporter.num_clips / seconds if num_done else None,
        stopped=stopped,
        best_step=session.progress.best_step,
        validation=reporter.last_validation,
        best=reporter.best_validation(),
    )
