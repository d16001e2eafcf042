"""Stage two's loop, top to bottom: read, predict, accumulate, refuse, step, record, save.

Owns: the order of things in a step. What is checked and built before is in `session`, the numerics
in `core.flow`, `masters` and `wan.adapter`.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wanlora import __version__, progress, runs
from wanlora.config import TrainConfig
from wanlora.core import flow, schedule
from wanlora.errors import NonFiniteError
from wanlora.files import write_atomic
from wanlora.train import checkpoints
from wanlora.train.batches import MicroBatch, read_ahead
from wanlora.train.session import Session, open_session, predict
from wanlora.wan.adapter import save_adapter


@dataclass(frozen=True)
class TrainResult:
    """What a run made."""

    output_dir: str
    adapter: str
    steps: int
    resumed_from: int
    trainable_parameters: int
    last_loss: float | None
    seconds: float
    seconds_per_step: float | None
    clips_per_s: float | None
    exit_code: int = 0

    def lines(self) -> list[str]:
        """Say what was made and what to type next."""
        if self.last_loss is None:
            return [f"{self.output_dir} is already at step {self.steps}; nothing was trained"]
        return [
            f"trained steps {self.resumed_from} to {self.steps - 1} in {self.seconds:.1f} s "
            f"({self.seconds_per_step:.3f} s/step, {self.clips_per_s:.2f} clips/s), "
            f"last loss {self.last_loss:.4f}",
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
    masters, optimizer, ranks = session.masters, session.optimizer, session.ranks
    steps = range(session.first_step, session.end_step)
    learning_rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        partial(
            schedule.multiplier,
            schedule=config.optimizer.schedule,
            warmup_steps=config.optimizer.warmup_steps,
            num_steps=session.end_step,
        ),
        last_epoch=session.first_step - 1,
    )
    if ranks.is_main_process:
        runs.truncate_metrics(config.output_dir, session.first_step)
    plan = [(step, slots) for step in steps for slots in session.slots]
    loss_of_step: float | None = None
    started = time.perf_counter()
    with (
        closing(read_ahead(session.source, plan, depth=config.prefetch_batches)) as batches,
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
            if ranks.num_processes > 1:
                masters.sum_over_ranks()
            grad_norm = masters.clip(config.optimizer.max_grad_norm)
            all_losses = _gather(torch.cat(slot_losses), session)
            _refuse_non_finite(session, step, all_losses, grad_norm)
            optimizer.step()
            masters.zero_grad()
            masters.publish()

            loss_of_step = float(all_losses.double().mean())
            row = {
                "step": step,
                "loss": loss_of_step,
                "lr": learning_rate.get_last_lr()[0],
                "grad_norm": float(grad_norm),
                "clips_per_s": session.global_batch / (time.perf_counter() - step_started),
                "data_wait_s": waited_s,
            }
            learning_rate.step()
            done = step + 1
            if ranks.is_main_process:
                runs.append_metrics(config.output_dir, row)
                bar.set_postfix_str(f"loss {row['loss']:.4f} lr {row['lr']:.1e}", refresh=False)
                bar.update()
                if done == session.end_step or (
                    config.save_steps and done % config.save_steps == 0
                ):
                    _save(config, session, done)
    ranks.wait_for_everyone()
    return _result(config, session, loss_of_step, time.perf_counter() - started)


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


def _gather(losses: Tensor, session: Session) -> Tensor:
    """Losses of all slots in slot order, so that the logged mean does not depend on the ranks."""
    if session.ranks.num_processes == 1:
        return losses
    parts = [torch.empty_like(losses) for _ in range(session.ranks.num_processes)]
    dist.all_gather(parts, losses)
    return torch.cat(parts)


def _refuse_non_finite(session: Session, step: int, losses: Tensor, grad_norm: Tensor) -> None:
    """Stop before the optimizer makes a NaN permanent, naming where it came from."""
    if torch.isfinite(grad_norm) and torch.isfinite(losses).all():
        return
    bad = [slot for slot, loss in enumerate(losses.tolist()) if not -torch.inf < loss < torch.inf]
    slots = [session.source.describe(step, slot) for slot in bad or range(len(losses))]
    raise NonFiniteError(
        f"step {step}: the {'loss' if bad else 'gradient'} is not finite "
        f"(gradient norm {float(grad_norm)}); nothing of this step was saved. Clips: "
        + "; ".join(slots[:4])
        + (f" and {len(slots) - 4} more" if len(slots) > 4 else "")
        + ". Lower --learning-rate, or look at those clips with: wanlora inspect --verify, then "
        "continue from the last checkpoint with --resume"
    )


def _save(config: TrainConfig, session: Session, done: int) -> None:
    """Publish a checkpoint, then its adapter at the root of the run."""

    def write(folder: Path) -> None:
        save_adapter(
            folder / runs.ADAPTER_NAME,
            session.masters.parameters,
            session.shape,
            provenance={
                **session.identity,
                "wanlora": __version__,
                "model": session.model,
                "step": str(done),
                "seed": str(config.seed),
            },
        )
        checkpoints.write_state(
            folder,
            step=done,
            identity=session.identity,
            masters=session.masters,
            optimizer=session.optimizer,
        )

    checkpoint = runs.publish_checkpoint(
        config.output_dir, done, write, keep=config.keep_checkpoints
    )
    write_atomic(
        config.output_dir / runs.ADAPTER_NAME, (checkpoint / runs.ADAPTER_NAME).read_bytes()
    )


def _bar(session: Session) -> Any:
    if not session.ranks.is_main_process:
        return nullcontext()
    return progress.bar(
        total=session.end_step, done=session.first_step, description="train", unit="step"
    )


def _result(
    config: TrainConfig, session: Session, loss: float | None, seconds: float
) -> TrainResult:
    num_done = session.end_step - session.first_step
    trained = loss is not None
    return TrainResult(
        output_dir=str(config.output_dir),
        adapter=str(config.output_dir / runs.ADAPTER_NAME),
        steps=max(session.end_step, session.first_step),
        resumed_from=session.first_step,
        trainable_parameters=sum(p.numel() for p in session.masters.parameters.values()),
        last_loss=loss,
        seconds=seconds,
        seconds_per_step=seconds / num_done if trained else None,
        clips_per_s=num_done * session.global_batch / seconds if trained else None,
    )
