"""Stage two's loop, top to bottom: read, predict, accumulate, refuse, step, record, save.

Owns: the order of things in a step. What is checked and built before is in `session`, the numerics
in `core.flow`, `predict`, `masters` and `wan.adapter`.
"""

import shlex
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wanlora import progress, runs
from wanlora.config import TrainConfig
from wanlora.core import flow, schedule
from wanlora.errors import NonFiniteError
from wanlora.step.batches import MicroBatch, read_ahead
from wanlora.step.predict import predict
from wanlora.train import saving
from wanlora.train.reporting import Reporter
from wanlora.train.session import Session, open_session
from wanlora.train.stopping import stop_on_signals


@dataclass(frozen=True)
class TrainResult:
    """What a run made.

    Attributes:
        stopped: Why it ended before its last step: a signal's name, "no new best", or None.
        validation: The last held-out report, as in validation.jsonl.
    """

    output_dir: str
    adapter: str
    steps: int
    resumed_from: int
    trainable_parameters: int
    last_loss: float | None
    seconds: float
    seconds_per_step: float | None
    clips_per_s: float | None
    stopped: str | None
    best_step: int | None
    validation: dict[str, Any] | None

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal's number, as shells have it."""
        return {"SIGINT": 130, "SIGTERM": 143}.get(self.stopped or "", 0)

    def lines(self) -> list[str]:
        """Say what was made and what to type next."""
        if self.last_loss is None:
            return [f"{self.output_dir} is already at step {self.steps}; nothing was trained"]
        lines = [
            f"trained steps {self.resumed_from} to {self.steps - 1} in {self.seconds:.1f} s "
            f"({self.seconds_per_step:.3f} s/step, {self.clips_per_s:.2f} clips/s), "
            f"last loss {self.last_loss:.4f}"
        ]
        if self.stopped:
            lines.append(f"stopped early: {self.stopped}; continue with the same command, --resume")
        if self.best_step is not None:
            lines.append(f"best held-out loss after {self.best_step} steps: {self.output_dir}/best")
        return [
            *lines,
            f"adapter: {self.adapter}",
            f'next: wanlora sample --adapter {self.output_dir} --prompt "..."',
        ]


def run(config: TrainConfig) -> TrainResult:
    """Train, or continue, the run in `config.output_dir`.

    Raises:
        WanloraError: Anything that makes the run impossible or pointless, before the first step;
            a non-finite loss or gradient, before the optimizer steps on it.
    """
    session = open_session(config)
    masters, optimizer, done = session.masters, session.optimizer, session.progress
    first_step = done.step
    steps = range(first_step, session.end_step)
    learning_rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        partial(
            schedule.multiplier,
            schedule=config.optimizer.schedule,
            warmup_steps=config.optimizer.warmup_steps,
            num_steps=session.end_step,
        ),
        last_epoch=first_step - 1,
    )
    plan = [(step, slots) for step in steps for slots in session.slots]
    started, stopped = time.perf_counter(), None
    with (
        _begin(config, session),
        closing(read_ahead(session.data.source, plan, depth=config.prefetch_batches)) as batches,
        stop_on_signals() as stop,
        closing(Reporter(config, session)) as reporter,
        _bar(session) as bar,
    ):
        for step in steps:
            step_started, waited_s, slot_losses = time.perf_counter(), 0.0, []
            for _ in session.slots:
                batch, wait_s = _next(batches)
                waited_s += wait_s
                losses = _losses(session, batch)
                # Divided by the global batch once: the sum over slots and ranks is then the mean.
                torch.autograd.backward(losses.sum() / session.global_batch)
                masters.accumulate()
                slot_losses.append(losses.detach())
            if session.ranks.num_processes > 1:
                masters.sum_over_ranks()
            grad_norm = masters.clip(config.optimizer.max_grad_norm)
            losses_of_step, stopping = _gather(torch.cat(slot_losses), stop.signal, session)
            _refuse_non_finite(config, session, step, losses_of_step, grad_norm)
            optimizer.step()
            masters.zero_grad()
            masters.publish()
            if session.average:
                session.average.update()
            done.step = step + 1

            row: dict[str, float] = {
                "step": step,
                "loss": float(losses_of_step.double().mean()),
                "lr": float(learning_rate.get_last_lr()[0]),
                "grad_norm": float(grad_norm),
            }
            learning_rate.step()
            reporter.step(row, seconds=time.perf_counter() - step_started, waited_s=waited_s)
            if reporter.validation_is_due() and not stopping:
                stopping = reporter.validate() or stopping
            reporter.preview_if_due()
            if session.is_main:
                bar.set_postfix_str(reporter.postfix(), refresh=False)
                bar.update()
                if stopping or saving.is_due(config, session):
                    saving.save(config, session)
            if stopping:
                stopped = stopping
                break
        reporter.finish()
    session.ranks.wait_for_everyone()
    return _result(config, session, reporter, first_step, stopped, time.perf_counter() - started)


@contextmanager
def _begin(config: TrainConfig, session: Session) -> Iterator[None]:
    """Take the run's folder into possession, now that nothing can be refused any more."""
    if not session.is_main:
        yield
        return
    settings = config.model_dump(mode="json")
    with runs.begin_run(config.output_dir, settings, session.facts, checkpoint=session.checkpoint):
        runs.forget_after(config.output_dir, session.progress.step)
        if session.checkpoint:
            saving.show(config.output_dir, session.checkpoint)
        yield


def _losses(session: Session, batch: MicroBatch) -> Tensor:
    """Weighted loss of each clip of a micro-batch."""
    prediction, target = predict(session.transformer, batch, session.device, session.dtype)
    losses = flow.loss_per_clip(prediction, target)
    return losses * batch.weights.to(losses.device)


def _next(batches: Iterator["Future[MicroBatch]"]) -> tuple[MicroBatch, float]:
    """Take the next micro-batch, and say how long the step had to wait for it, in seconds."""
    started = time.perf_counter()
    batch = next(batches).result()
    return batch, time.perf_counter() - started


def _gather(
    losses: Tensor, stop: signal.Signals | None, session: Session
) -> tuple[Tensor, str | None]:
    """Losses of all slots in slot order, and the signal that any rank got.

    In slot order, the logged mean does not depend on the ranks; in one message, all ranks stop
    after the same step.
    """
    if session.ranks.num_processes == 1:
        return losses, stop.name if stop else None
    mine = torch.cat([losses, losses.new_tensor([float(stop or 0)])])
    parts = [torch.empty_like(mine) for _ in range(session.ranks.num_processes)]
    dist.all_gather(parts, mine)
    heard = max(int(part[-1]) for part in parts)
    return torch.cat([part[:-1] for part in parts]), signal.Signals(heard).name if heard else None


def _refuse_non_finite(
    config: TrainConfig, session: Session, step: int, losses: Tensor, grad_norm: Tensor
) -> None:
    """Stop before the optimizer makes a NaN permanent, naming where it came from."""
    if torch.isfinite(grad_norm) and torch.isfinite(losses).all():
        return
    finite = torch.isfinite(losses).tolist()
    bad = [slot for slot, is_finite in enumerate(finite) if not is_finite]
    source = session.data.source
    slots = [source.describe(step, slot) for slot in bad or range(len(losses))]
    raise NonFiniteError(
        f"step {step}: the {'loss' if bad else 'gradient'} is not finite "
        f"(gradient norm {float(grad_norm)}); nothing of this step was saved. Clips: "
        + "; ".join(slots[:4])
        + (f" and {len(slots) - 4} more" if len(slots) > 4 else "")
        + ". If the learning rate is too high, start anew in another --output-dir with a lower "
        "--learning-rate; to see whether these clips are damaged: wanlora inspect "
        f"{shlex.quote(str(config.cache))} --verify"
    )


def _bar(session: Session) -> Any:
    if not session.is_main:
        return nullcontext()
    return progress.bar(
        total=session.end_step, done=session.progress.step, description="train", unit="step"
    )


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
        adapter=str(config.output_dir / runs.ADAPTER_NAME),
        steps=session.progress.step,
        resumed_from=first_step,
        trainable_parameters=sum(p.numel() for p in session.masters.parameters.values()),
        last_loss=reporter.last_loss,
        seconds=seconds,
        seconds_per_step=seconds / num_done if num_done else None,
        clips_per_s=num_done * session.global_batch / seconds if num_done else None,
        stopped=stopped,
        best_step=session.progress.best_step,
        validation=reporter.last_validation,
    )
