"""Record of a run while it trains: a row per step and validation, the trackers, page and card.

Owns: the figures of a row. `runs.record` and `runs.page` write them.
"""

import logging
from typing import Any

import numpy as np
from jaxtyping import UInt8

from wanlora.commands.train.advice import (
    best_held_out,
    last_held_out,
    warn_of_rate_jump,
    warn_of_worse_than_base,
)
from wanlora.commands.train.card_facts import card_facts
from wanlora.commands.train.model_card import model_card, write_card
from wanlora.commands.train.session import Session
from wanlora.core.buckets import Bucket, num_tokens
from wanlora.cost.flops import step_flops
from wanlora.report.run_status import DONE, STOPPED
from wanlora.runs import run_folder
from wanlora.runs.page import LivePage
from wanlora.runs.record import Recorder, Smoothed, device_name, step_figures
from wanlora.training.outcomes import Outcome
from wanlora.training.pace import compare_with_prediction

logger = logging.getLogger(__name__)


class Reporter:
    """The record of a run, open while it trains. Only the main process writes it.

    Args:
        session: The run.
        page: The run's page; None on processes other than the main one.

    Attributes:
        num_clips: Clips in the steps so far, over all ranks.
        last_loss: Training loss of the last step.
        last_validation: Last row of validation.jsonl for the newest adapter on held-out clips.
    """

    def __init__(self, session: Session, page: LivePage | None = None) -> None:
        run = session.run
        self._page = page
        self._session = session
        self._recorder = None
        rows: list[dict[str, Any]] = []
        validations: list[dict[str, Any]] = []
        if session.ranks.is_main:
            rows = run_folder.read_rows(run.folder, run_folder.METRICS_NAME)
            validations = run_folder.read_rows(run.folder, run_folder.VALIDATION_NAME)
            if rows:
                warn_of_rate_jump(
                    run.schedule, session.model.peak_rate, rows[-1],
                    warmup_steps=run.warmup_steps, end_step=run.end_step,
                )  # fmt: skip
            self._recorder = Recorder(
                run.folder, run.trackers, run.settings, first_step=run.progress.step
            )
        self._loss = Smoothed().add_all(row["loss"] for row in rows)
        self._pace = Smoothed()
        self._flops_of: dict[Bucket, float] = {}
        self._device_name = device_name(session.model.device)
        self._row: dict[str, Any] | None = None
        self._steps: list[tuple[float, Bucket]] = []
        self.num_clips = 0
        self.last_loss: float | None = None
        self.last_validation = last_held_out(validations)

    def step(self, outcome: Outcome) -> None:
        """Record an optimizer step."""
        session, seconds = self._session, outcome.seconds
        bucket, num_clips = session.data.bucket(outcome.step), session.data.num_clips(outcome.step)
        self.num_clips += num_clips
        self.last_loss = float(outcome.losses.mean())
        self._loss, self._pace = self._loss.add(self.last_loss), self._pace.add(seconds)
        row: dict[str, Any] = {
            "step": outcome.step,
            "bucket": str(bucket),
            "clips": num_clips,
            "loss": self.last_loss,
            "lr": outcome.learning_rate,
            "grad_norm": outcome.grad_norm,
            "attention": session.model.kernel.name,
            "clips_per_s": num_clips / seconds,
            "data_wait_s": outcome.waited_s,
        }
        row |= step_figures(
            loss=self._loss,
            pace=self._pace,
            seconds=seconds,
            waited_s=outcome.waited_s,
            flops=self._flops(bucket),
            device=session.model.device,
            device_name=self._device_name,
            steps_left=session.run.end_step - outcome.step - 1,
        )
        if self._recorder:
            run_folder.append_row(session.run.folder, run_folder.METRICS_NAME, row)
            self._recorder.step(row)
        self._row = row
        self._steps.append((seconds, bucket))

    def figures(self) -> tuple[str, ...]:
        """Figures of the newest recorded step for the progress bar, the most important first."""
        row = self._row
        if row is None:
            return ()
        speed = f"mfu {100 * row['mfu']:.0f} %" if row["mfu"] else f"{row['tflops']:.3g} TFLOP/s"
        return (
            f"loss {row['loss_smoothed']:.4f}", f"lr {row['lr']:.1e}", speed,
            f"data {row['data_wait_pct']:.0f} %", f"mem {row['peak_memory_gb']:.1f} GB",
        )  # fmt: skip

    def record_validation(self, row: dict[str, Any]) -> None:
        """Record a row of validation.jsonl; on the main process only."""
        assert self._recorder
        if last_held_out([row]):
            self.last_validation = row
        run_folder.append_row(self._session.run.folder, run_folder.VALIDATION_NAME, row)
        self._recorder.validation(row["step"], row)

    def record_previews(self, pictures: dict[int, UInt8[np.ndarray, "f h w 3"]]) -> None:
        """Send pictures of previews, by index of their prompt, to the trackers and the page."""
        assert self._recorder
        for index, frames in pictures.items():
            self._recorder.images(self._session.run.progress.step, f"preview/{index}", frames)
        self.renew_page()

    def renew_page(self) -> None:
        """Request that the run's page is written soon."""
        if self._page:
            self._page.renew()

    def best_validation(self) -> dict[str, Any] | None:
        """Row of validation.jsonl for the adapter in `best/`; on the main process only."""
        run = self._session.run
        rows = run_folder.read_rows(run.folder, run_folder.VALIDATION_NAME)
        return best_held_out(rows, run.progress) if self._recorder else None

    def finish(self, stopped: str | None) -> None:
        """Write the model card and the last page; compare the run's pace with its prediction.

        Args:
            stopped: Reason why the run ends before its last step, or None.
        """
        if self._recorder:
            self._log_pace()
            best, final = self.best_validation(), self.last_validation
            warn_of_worse_than_base(final, best, rate=self._session.model.peak_rate)
            facts = card_facts(self._session, loss=self._loss.value, best=best, final=final)
            write_card(self._session.run.folder / run_folder.CARD_NAME, model_card(facts))
        if self._page:
            self._page.end(STOPPED if stopped else DONE, stopped)

    def close(self) -> None:
        """Close the trackers."""
        if self._recorder:
            self._recorder.close()

    def _log_pace(self) -> None:
        plan = self._session.step_plan
        seconds, buckets = zip(*self._steps, strict=True) if self._steps else ((), ())
        text = compare_with_prediction(
            seconds, buckets, work=plan.work, trial=plan.trial, slots=plan.slots,
            device_name=self._device_name,
        )  # fmt: skip
        if text:
            logger.info("%s", text)

    def _flops(self, bucket: Bucket) -> float:
        """FLOPs of this process's share of a bucket's step, without recomputation."""
        model = self._session.model
        if bucket not in self._flops_of:
            self._flops_of[bucket] = step_flops(
                model.variant.shape,
                num_tokens(bucket),
                rank=model.shape.rank,
                adapted=model.masters.modules,
            ).model
        return self._flops_of[bucket] * sum(map(len, self._session.step_plan.slots[bucket]))
