"""Errors of a training step, with the way to continue: no memory left, a value that is not finite.

Owns: their text.
"""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from wanlora.commands.train.data import Data
from wanlora.core import units
from wanlora.errors import NonFiniteError
from wanlora.runs import run_folder
from wanlora.runs.checkpoints import Progress
from wanlora.training.outcomes import Outcome
from wanlora.training.workload import Trial, describe
from wanlora.wan import attention


def explain_memory(run_dir: Path, done: Progress, trial: Trial, reason: str) -> str:
    """Explain how to continue a run that is out of memory although the largest bucket fitted."""
    return (
        f"out of memory after {done.step} steps with activations {describe(trial.modes)}: "
        f"{reason} Saved checkpoints are complete: continue with "
        f"{run_folder.resume_command(run_dir)} "
        "--activations selective (or full), or stop other programs that use this memory"
    )


def non_finite(outcome: Outcome, data: Data, more: str) -> NonFiniteError:
    """Name the step and the clips of a loss or gradient that is not finite.

    Args:
        outcome: The step; nothing of it was or will be saved.
        data: The run's clips.
        more: More advice, from `suspect_kernel`.
    """
    bad = [slot for slot, loss in enumerate(outcome.losses) if not math.isfinite(loss)]
    slots = [data.source.describe(outcome.step, slot) for slot in bad or range(len(outcome.losses))]
    return NonFiniteError(
        f"step {outcome.step}: the {'loss' if bad else 'gradient'} is not finite "
        f"(gradient norm {outcome.grad_norm}); nothing of this step was saved. Clips: "
        + units.names(slots, most=4, separator="; ")
        + ". If the learning rate is too high, start again in another --output-dir with a lower "
        "--learning-rate; to see whether these clips are damaged: wanlora inspect "
        f"{shlex.quote(str(data.cache))} --verify{more}"
    )


def suspect_kernel(
    run_dir: Path, kernel: str, operators: Sequence[str], device: torch.device
) -> str:
    """Advise another attention kernel on a GPU: backward passes of some have returned NaN.

    Args:
        run_dir: The run's folder.
        kernel: Setting of the attention kernel.
        operators: Attention operators that ran.
        device: Device of the run.
    """
    if device.type != "cuda":
        return ""
    return (
        f". If neither is the cause, another attention kernel may help (this one: "
        f"{', '.join(operators)}): {run_folder.resume_command(run_dir)} "
        f"{attention.use_another(kernel, device)}"
    )
