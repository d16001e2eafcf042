"""What a run says about itself: metrics, validations, previews, and what follows from them.

Owns: when to validate and preview, which checkpoint is best, and when validation says to stop.
How curves and pictures are written is `record`'s, `previews`' and the report's business.
"""

import logging
import signal
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from wanlora.commands.train import saving
from wanlora.commands.train.advice import (
    best_held_out,
    last_held_out,
    warn_of_overfitting,
    warn_of_rate_jump,
    warn_of_worse_than_base,
)
from wanlora.commands.train.model_card import card_facts, model_card, updated_card
from wanlora.commands.train.previews import preview, save_previews
from wanlora.commands.train.session import Session
from wanlora.config import TrainConfig
from wanlora.core.buckets import Bucket, num_tokens, usual
from wanlora.cost.flops import step_flops
from wanlora.files import write_json, write_text
from wanlora.report.run_status import DONE, STOPPED
from wanlora.runs import run_folder
from wanlora.runs.page import LivePage
from wanlora.runs.record import Recorder, Smoothed, name_of
from wanlora.runs.record import row as figures
from wanlora.store.latent_rgb import solve
from wanlora.store.views import frame_rate
from wanlora.training.outcomes import Outcome
from wanlora.training.pace import against_prediction
from wanlora.training.panel import Report
from wanlora.training.validation import (
    ADAPTER,
    EMA,
    Panel,
    StopSignal,
    ValidationStopped,
    describe,
    record,
    validate,
)

logger = logging.getLogger(__name__)


class Reporter:
    """The record of a run, open while it trains.

    Args:
        config: The run's settings.
        session: What is trained; its `progress` holds what was best.
        stop: Number of the signal that requests a stop, or 0; a validation checks it.
        page: The run's page; None on processes other than the main one.
    """

    def __init__(
        self,
        config: TrainConfig,
        session: Session,
        stop: StopSignal = int,
        page: LivePage | None = None,
    ) -> None:
        self._config = config
        self._page = page
        self._session = session
        self._stop = stop
        self._recorder = None
        rows: list[dict[str, Any]] = []
        validations: list[dict[str, Any]] = []
        if session.is_main:
            rows = run_folder.read_rows(config.output_dir, run_folder.METRICS_NAME)
            validations = run_folder.read_rows(config.output_dir, run_folder.VALIDATION_NAME)
            if rows:
                warn_of_rate_jump(
                    config.optimizer.schedule,
                    session.optimizer.param_groups[0]["initial_lr"],
                    rows[-1],
                    warmup_steps=session.warmup_steps,
                    end_step=session.end_step,
                )
            self._recorder = Recorder(
                config.output_dir,
                config.trackers,
                config.model_dump(mode="json"),
                first_step=session.progress.step,
            )
        self._loss = Smoothed().over(row["loss"] for row in rows)
        self._pace = Smoothed()
        self._flops_of: dict[Bucket, float] = {}
        self._device_name = name_of(session.device)
        self._row: dict[str, Any] | None = None
        self._taken: list[tuple[float, Bucket]] = []
        self.num_clips = 0
        self.last_loss: float | None = None
        self.last_validation = last_held_out(validations)

    def step(self, outcome: Outcome) -> None:
        """Record an optimizer step."""
        session, seconds = self._session, outcome.seconds
        bucket, num_clips = session.bucket(outcome.step), session.num_clips(outcome.step)
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
            "clips_per_s": num_clips / seconds,
            "data_wait_s": outcome.waited_s,
        }
        row |= figures(
            loss=self._loss,
            pace=self._pace,
            seconds=seconds,
            waited_s=outcome.waited_s,
            flops=self._flops(bucket),
            device=session.device,
            device_name=self._device_name,
            steps_left=session.end_step - outcome.step - 1,
        )
        if self._recorder:
            run_folder.append_row(self._config.output_dir, run_folder.METRICS_NAME, row)
            self._recorder.step(row)
        self._row = row
        self._taken.append((seconds, bucket))

    def figures(self) -> tuple[str, ...]:
        """Figures of the newest step recorded, for the progress bar; the most important first."""
        row = self._row
        if row is None:
            return ()
        speed = f"mfu {100 * row['mfu']:.0f} %" if row["mfu"] else f"{row['tflops']:.3g} TFLOP/s"
        return (
            f"loss {row['loss_smoothed']:.4f}", f"lr {row['lr']:.1e}", speed,
            f"data {row['data_wait_pct']:.0f} %", f"mem {row['peak_memory_gb']:.1f} GB",
        )  # fmt: skip

    def is_due(self) -> bool:
        """Whether the run pauses after this step, to validate or to show a preview."""
        return self.validation_is_due() or self._preview_is_due()

    def validation_is_due(self) -> bool:
        """See the function of this name."""
        return validation_is_due(self._config, self._session)

    def validate(self) -> str | None:
        """Measure the panels and keep the best adapter; return a reason to stop, if any."""
        started = time.perf_counter()
        session = self._session
        try:
            reports = [
                (panel, weights, self._measure(panel, weights))
                for panel in session.data.panels
                # The overfitting check compares both panels on the weights being trained.
                for weights in ((EMA, ADAPTER) if panel.name == "val" and session.average
                                else (ADAPTER,))
            ]  # fmt: skip
        except ValidationStopped as request:
            return signal.Signals(request.signal_number).name
        if session.is_main:
            logger.info(
                "validation after step %d took %.1f s for %d forward passes",
                session.progress.step - 1, time.perf_counter() - started,
                sum(len(panel.clips) * len(panel.sigmas) for panel, _, _ in reports),
            )  # fmt: skip
            for panel, weights, report in reports:
                self._record(panel, weights, report)
        session.progress.validated_step = session.progress.step
        held_out = {weights: each.mean for panel, weights, each in reports if panel.name == "val"}
        if held_out:
            self._note_best(held_out)
        if self._page:
            warn_of_overfitting(self._config, session.panel_keys, session.progress)
            self._page.renew()
        patience = self._config.validation.patience
        if held_out and patience and session.progress.stale >= patience:
            return run_folder.out_of_patience(patience)
        return None

    def best_validation(self) -> dict[str, Any] | None:
        """Row of validation.jsonl for the adapter in `best/`; on the main process alone."""
        rows = run_folder.read_rows(self._config.output_dir, run_folder.VALIDATION_NAME)
        return best_held_out(rows, self._session.progress) if self._recorder else None

    def preview_at_start(self) -> None:
        """Show the base before the first step, or what a run that was stopped did not show."""
        session, done = self._session, self._session.progress.step
        if not session.preview_every or done % session.preview_every or done == session.end_step:
            return
        folder = self._config.output_dir / run_folder.PREVIEWS_NAME / f"step-{done:06d}"
        if session.ranks.from_main(lambda: not folder.exists()):
            self._preview()

    def preview_if_due(self) -> None:
        """Denoise the preview prompts to latents, and show them."""
        if self._preview_is_due():
            self._preview()

    def _preview(self) -> None:
        """Denoise on the main process; the others wait for one prompt at a time."""
        session = self._session
        if not session.is_main:
            for _ in session.prompts:
                session.ranks.barrier()
            return
        assert self._recorder
        for index, frames in _make_previews(self._config, session, self._stop).items():
            self._recorder.images(session.progress.step, f"preview/{index}", frames)
        if self._page:
            self._page.renew()

    def finish(self, stopped: str | None) -> None:
        """Write the model card and the last page; compare the run's pace with its prediction.

        Args:
            stopped: Reason why the run ends before its last step, or None.
        """
        session = self._session
        if self._recorder:
            seconds, buckets = zip(*self._taken, strict=True) if self._taken else ((), ())
            said = against_prediction(
                seconds, buckets, work=session.work, trial=session.trial,
                slots=session.slots, device_name=self._device_name,
            )  # fmt: skip
            if said:
                logger.info("%s", said)
            best, final = self.best_validation(), self.last_validation
            warn_of_worse_than_base(
                final, best, rate=session.optimizer.param_groups[0]["initial_lr"]
            )
            card = model_card(
                card_facts(self._config, session, loss=self._loss.value, best=best, final=final)
            )
            _write_card(self._config.output_dir / run_folder.CARD_NAME, card)
        if self._page:
            self._page.end(STOPPED if stopped else DONE, stopped)

    def close(self) -> None:
        """Close what is open."""
        if self._recorder:
            self._recorder.close()

    def _preview_is_due(self) -> bool:
        every, done = self._session.preview_every, self._session.progress.step
        return bool(every) and (done % every == 0 or done == self._session.end_step)

    def _flops(self, bucket: Bucket) -> float:
        """What this process's share of a bucket's step needs, recomputation not counted."""
        session = self._session
        if bucket not in self._flops_of:
            counted = step_flops(
                session.variant.transformer_shape,
                num_tokens(bucket),
                rank=session.shape.rank,
                adapted=session.masters.modules,
            )
            self._flops_of[bucket] = counted.model
        return self._flops_of[bucket] * sum(map(len, session.slots[bucket]))

    def _measure(self, panel: Panel, weights: str) -> Report:
        session = self._session
        assert session.average or weights == ADAPTER
        measured = (
            session.masters.replaced_by(session.average.tensors)
            if session.average and weights == EMA
            else nullcontext()
        )
        with measured:
            report = validate(
                panel,
                session.transformer,
                session.data.source,
                session.base_losses,
                key=session.panel_keys[panel.name],
                device=session.device,
                dtype=session.dtype,
                rank=session.ranks.index,
                num_ranks=session.ranks.count,
                stop=self._stop,
                barrier=session.ranks.barrier,
            )
        if session.is_main:  # at once: the base need not be measured again after a stop
            path = self._config.output_dir / run_folder.BASE_LOSSES_NAME
            write_json(path, session.base_losses)
            logger.info("%s", describe(panel, report, weights=weights))
        return report

    def _record(self, panel: Panel, weights: str, report: Report) -> None:
        step, key = self._session.progress.step, self._session.panel_keys[panel.name]
        row = record(step, panel, report, key=key, weights=weights)
        if (panel.name, weights) == ("val", ADAPTER):
            self.last_validation = row
        run_folder.append_row(self._config.output_dir, run_folder.VALIDATION_NAME, row)
        assert self._recorder
        self._recorder.validation(step, row)

    def _note_best(self, held_out: Mapping[str, float]) -> None:
        """Keep the weights of the lowest loss, if it is lower than any before."""
        progress = self._session.progress
        weights = min(held_out, key=lambda name: (held_out[name], name))
        if progress.best_loss is not None and held_out[weights] >= progress.best_loss:
            progress.stale += 1
            return
        progress.best_step, progress.best_loss = progress.step, held_out[weights]
        progress.best_weights, progress.stale = weights, 0
        if self._session.is_main:
            saving.save_best(self._config, self._session, weights)


def _write_card(path: Path, made: str) -> None:
    """Write the card, or bring the generated part of one that is there up to date."""
    if not path.exists():
        write_text(path, made)
        return
    try:
        card = updated_card(path.read_bytes().decode(), made)
    except UnicodeDecodeError:
        card = None
    if card is None:
        logger.warning(
            "%s is kept as it is: the part that training writes was edited or has no marks. To "
            "have it written again, move the file away and run the command again",
            path,
        )
        return
    write_text(path, card)


def validation_is_due(config: TrainConfig, session: Session) -> bool:
    """Whether the panels are measured now; also when a run continues that stopped before it."""
    every, progress = config.validation.every, session.progress
    done = progress.step
    if not every or not done or done == progress.validated_step:
        return False
    return done % every == 0 or done == session.end_step


def _make_previews(
    config: TrainConfig, session: Session, stop: StopSignal
) -> dict[int, UInt8[np.ndarray, "f h w 3"]]:
    """Denoise at the clips' usual size, save the latents, and return rough pictures."""
    source, variant = session.data.source, session.variant
    latents = preview(
        session.transformer,
        prompt_embeds=torch.stack([prompt.embeds for prompt in session.prompts]),
        negative_embeds=source.padded_prompt(session.data.view.negative_prompt),
        bucket=usual(clip.bucket for clip in session.data.clips),
        num_channels=variant.z_dim,
        steps=config.previews.steps,
        guidance_scale=variant.guidance_scale,
        shift=source.shift,
        seed=config.seed,
        device=session.device,
        dtype=session.dtype,
        stop=stop,
        after_each=session.ranks.barrier,
    )
    return save_previews(
        config.output_dir,
        session.progress.step,
        [prompt.text for prompt in session.prompts][: len(latents)],
        latents,
        solve(*source.reader.latent_rgb()),
        seed=config.seed,
        fps=frame_rate(session.data.clips),
        facts={"model": session.facts["model"], "variant": variant.name},
    )
