"""Previews of a run while it trains: their schedule, size, seed and prompts.

Owns: the choice of these. `previews` denoises them and writes the files.
"""

import numpy as np
import torch
from jaxtyping import UInt8

from wanlora.commands.train.previews import preview, save_previews
from wanlora.commands.train.prompts import preview_bucket
from wanlora.commands.train.reporting import Reporter
from wanlora.commands.train.session import Run, Session
from wanlora.runs import run_folder
from wanlora.store.latent_rgb import solve
from wanlora.store.views import frame_rate
from wanlora.training.validation import StopSignal


def is_due(run: Run) -> bool:
    """Return whether to make previews now."""
    every, done = run.previews.every, run.progress.step
    return bool(every) and (done % every == 0 or done == run.end_step)


def preview_at_start(session: Session, reporter: Reporter, stop: StopSignal) -> None:
    """Make the previews of the base, or those that a stopped run has not made.

    Args:
        session: The run.
        reporter: Receives the pictures.
        stop: Returns the number of a signal that requests a stop, or 0.
    """
    run = session.run
    if not is_due(run) or run.progress.step == run.end_step:
        return
    folder = run.folder / run_folder.PREVIEWS_NAME / f"step-{run.progress.step:06d}"
    if session.ranks.from_main(lambda: not folder.exists()):
        make_previews(session, reporter, stop)


def make_previews(session: Session, reporter: Reporter, stop: StopSignal) -> None:
    """Denoise on the main process; the others wait for one prompt at a time.

    Args:
        session: The run.
        reporter: Receives the pictures.
        stop: Returns the number of a signal that requests a stop, or 0.
    """
    if session.ranks.is_main:
        reporter.record_previews(_denoise_and_save(session, stop))
        return
    for _ in session.run.previews.prompts:
        session.ranks.barrier()


def _denoise_and_save(
    session: Session, stop: StopSignal
) -> dict[int, UInt8[np.ndarray, "f h w 3"]]:
    """Denoise at the clips' usual size, save the latents, and return rough pictures."""
    model, run, source = session.model, session.run, session.data.source
    prompts, variant = run.previews.prompts, model.variant
    latents = preview(
        model.transformer,
        prompt_embeds=torch.stack([prompt.embeds for prompt in prompts]),
        negative_embeds=source.padded_prompt(session.data.view.negative_prompt),
        conditions=[
            {name: rows[0] for name, rows in source.conditions([prompt.start]).items()}
            if prompt.start
            else {}
            for prompt in prompts
        ],
        bucket=preview_bucket(session.data),
        num_channels=variant.vae.z_dim,
        steps=run.previews.num_steps,
        guidance_scale=model.part.guidance_scale,
        shift=source.shift,
        seed=source.seed,
        device=model.device,
        dtype=model.dtype,
        stop=stop,
        after_each=session.ranks.barrier,
    )
    return save_previews(
        run.folder,
        run.progress.step,
        [prompt.text for prompt in prompts][: len(latents)],
        latents,
        solve(*source.reader.latent_rgb()),
        seed=source.seed,
        fps=frame_rate(session.data.clips),
        facts={"model": run.facts["model"], "variant": variant.name},
        first_frames_of=[prompt.start.clip_id for prompt in prompts if prompt.start],
    )
