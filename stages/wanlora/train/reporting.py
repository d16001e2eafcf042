"""What a run says about itself: metrics, validations, previews, and what follows from them.

Owns: when to validate and preview, which checkpoint is best, and when validation says to stop.
How curves and pictures are written is `record`'s, `previews`' and the report's business.
"""

import logging
import time
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from wanlora import runs
from wanlora.config import TrainConfig
from wanlora.core.buckets import Bucket, num_tokens, usual
from wanlora.core.flops import step_flops
from wanlora.core.latent_rgb import solve
from wanlora.core.validation import Report
from wanlora.files import write_json, write_text
from wanlora.step.validation import Panel, describe, validate
from wanlora.store.views import frame_rate
from wanlora.train import saving
from wanlora.train.model_card import card_facts, model_card
from wanlora.train.outcomes import Outcome
from wanlora.train.pace import against_prediction
from wanlora.train.page import write_page
from wanlora.train.previews import preview, save_previews
from wanlora.train.record import Recorder, Smoothed, name_of
from wanlora.train.record import row as figures
from wanlora.train.session import Session

logger = logging.getLogger(__name__)

OVERFIT_VALIDATIONS = 2


class Reporter:
    """The record of a run, open while it trains.

    Args:
        config: The run's settings.
        session: What is trained; its `progress` holds what was best.
    """

    def __init__(self, config: TrainConfig, session: Session) -> None:
        self._config = config
        self._session = session
        self._recorder = None
        rows: list[dict[str, Any]] = []
        if session.is_main:
            rows = runs.read_rows(config.output_dir, runs.METRICS_NAME)
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
        self.last_validation: dict[str, Any] | None = None

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
            runs.append_row(self._config.output_dir, runs.METRICS_NAME, row)
            self._recorder.step(row)
        self._row = row
        self._taken.append((seconds, bucket))

    def postfix(self) -> str:
        """Figures of the newest step recorded, beside the progress bar."""
        row = self._row
        if row is None:
            return ""
        speed = f"mfu {100 * row['mfu']:.0f} %" if row["mfu"] else f"{row['tflops']:.3g} TFLOP/s"
        return (
            f"loss {row['loss_smoothed']:.4f} lr {row['lr']:.1e} {speed} "
            f"data {row['data_wait_pct']:.0f} % mem {row['peak_memory_gb']:.1f} GB"
        )

    def is_due(self) -> bool:
        """Whether the run pauses after this step, to validate or to show a preview."""
        return self.validation_is_due() or self._preview_is_due()

    def validation_is_due(self) -> bool:
        """Whether the panels are measured after this step."""
        every, done = self._config.validation.every, self._session.progress.step
        return bool(every) and (done % every == 0 or done == self._session.end_step)

    def validate(self) -> str | None:
        """Measure the panels, keep the best adapter, and say whether to stop."""
        started = time.perf_counter()
        reports = {panel.name: self._measure(panel) for panel in self._session.data.panels}
        if self._session.is_main:
            forwards = sum(len(p.clips) * len(p.sigmas) for p in self._session.data.panels)
            logger.info(
                "validation after step %d took %.1f s for %d forward passes",
                self._session.progress.step - 1, time.perf_counter() - started, forwards,
            )  # fmt: skip
        if self._recorder:
            write_page(self._config.output_dir)
        if "val" not in reports:
            return None
        self._note_best(reports["val"])
        if self._recorder:
            warn_of_overfitting(self._config, best_step=self._session.progress.best_step)
        patience = self._config.validation.patience
        if patience and self._session.progress.stale >= patience:
            return f"no new best in {patience} validations"
        return None

    def preview_if_due(self) -> None:
        """Denoise the preview prompts to latents, and show them; on the main process alone."""
        done = self._session.progress.step
        if self._recorder and self._preview_is_due():
            for index, frames in _make_previews(self._config, self._session).items():
                self._recorder.images(done, f"preview/{index}", frames)

    def finish(self) -> None:
        """Write the run's page and its model card; say how the run kept to what was predicted."""
        session = self._session
        if self._recorder:
            seconds, buckets = zip(*self._taken, strict=True) if self._taken else ((), ())
            said = against_prediction(
                seconds, buckets, work=session.work, trial=session.trial,
                slots=session.slots, device_name=self._device_name,
            )  # fmt: skip
            if said:
                logger.info("%s", said)
            write_page(self._config.output_dir)
            card = model_card(card_facts(self._config, self._session, self.last_validation))
            write_text(self._config.output_dir / runs.CARD_NAME, card)

    def close(self) -> None:
        """Close what is open."""
        if self._recorder:
            self._recorder.close()

    def _preview_is_due(self) -> bool:
        every, done = self._config.previews.every, self._session.progress.step
        return bool(every) and done % every == 0

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

    def _measure(self, panel: Panel) -> Report:
        session = self._session
        report = validate(
            panel,
            session.transformer,
            session.data.source,
            session.base_losses,
            device=session.device,
            dtype=session.dtype,
            rank=session.ranks.index,
            num_ranks=session.ranks.count,
            meet=session.ranks.meet,
        )
        row = {"step": session.progress.step, "split": panel.name, **asdict(report)}
        if panel.name == "val":
            self.last_validation = row
        if session.is_main:
            run_dir = self._config.output_dir
            write_json(run_dir / runs.BASE_LOSSES_NAME, session.base_losses)
            runs.append_row(run_dir, runs.VALIDATION_NAME, row)
            assert self._recorder
            self._recorder.validation(session.progress.step, row)
            logger.info("%s", describe(panel, report))
        return report

    def _note_best(self, report: Report) -> None:
        progress = self._session.progress
        if progress.best_loss is None or report.mean < progress.best_loss:
            progress.best_loss, progress.best_step = report.mean, progress.step
            progress.stale = 0
            if self._session.is_main:
                saving.save_best(self._config, self._session)
        else:
            progress.stale += 1


def warn_of_overfitting(config: TrainConfig, *, best_step: int | None) -> None:
    """Say it when training clips still improve while held-out ones got worse, twice in a row."""
    rows = runs.read_rows(config.output_dir, runs.VALIDATION_NAME)
    recent = {
        split: [row["mean"] for row in rows if row["split"] == split][-OVERFIT_VALIDATIONS - 1 :]
        for split in ("train", "val")
    }
    if min(map(len, recent.values())) <= OVERFIT_VALIDATIONS:
        return
    if _falls(recent["train"]) and _falls(recent["val"][::-1]):
        logger.warning(
            "overfitting: the loss on training clips falls while that on held-out clips rises; "
            "the best adapter so far is that of step %s, in best/",
            best_step,
        )


def _preview_prompts(config: TrainConfig, session: Session) -> list[tuple[str, str]]:
    """(what it is called, key): the view's validation prompts, else captions of held-out clips."""
    view = session.data.view
    named = [(prompt.prompt, prompt.key) for prompt in view.validation_prompts]
    held_out = [clip for clip in view.clips if clip.split == config.validation.split]
    captions = [
        (f"the caption of {clip.clip_id}", clip.prompts[0])
        for clip in held_out or session.data.clips
    ]
    return (named or captions)[: config.previews.num_prompts]


def _make_previews(
    config: TrainConfig, session: Session
) -> dict[int, UInt8[np.ndarray, "f h w 3"]]:
    """Denoise at the clips' usual size, save the latents, and return rough pictures."""
    source, variant = session.data.source, session.variant
    prompts = _preview_prompts(config, session)
    bucket = usual(clip.bucket for clip in session.data.clips)
    latents = preview(
        session.transformer,
        prompt_embeds=torch.stack([source.padded_prompt(key) for _, key in prompts]),
        negative_embeds=source.padded_prompt(session.data.view.negative_prompt),
        bucket=bucket,
        num_channels=variant.z_dim,
        steps=config.previews.steps,
        guidance_scale=variant.guidance_scale,
        shift=source.shift,
        seed=config.seed,
        device=session.device,
        dtype=session.dtype,
    )
    return save_previews(
        config.output_dir,
        session.progress.step,
        [name for name, _ in prompts],
        latents,
        solve(*source.reader.latent_rgb()),
        seed=config.seed,
        fps=frame_rate(session.data.clips),
        facts={"model": session.facts["model"], "variant": variant.name},
    )


def _falls(values: list[float]) -> bool:
    return all(later < earlier for earlier, later in pairwise(values))
