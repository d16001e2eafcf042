"""Checkpoints of a run, and its newest, best and averaged adapter.

Owns: the times at which files are written, and the agreement of `best/` with the progress. `runs`
and `files` write them.
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

from torch import Tensor

from wanlora.adapters.file import read_adapter, save_adapter
from wanlora.commands.train.session import Run, TrainedModel
from wanlora.errors import AdapterError
from wanlora.files import partial_path, publish, write_atomic, writing
from wanlora.runs import checkpoints, run_folder
from wanlora.runs.checkpoints import Progress
from wanlora.runs.publish import publish_checkpoint
from wanlora.training.validation import ADAPTER, EMA

logger = logging.getLogger(__name__)


def save(model: TrainedModel, run: Run) -> None:
    """Publish a checkpoint, then its adapters at the root of the run."""

    def write(folder: Path) -> None:
        _write_adapter(folder, model, run, ADAPTER)
        if model.average:
            _write_adapter(folder / run_folder.EMA_NAME, model, run, EMA)
        _keep_best(run.folder, folder, run.progress)
        checkpoints.write_state(
            folder,
            progress=run.progress,
            identity=run.identity,
            facts=run.facts,
            masters=model.masters,
            optimizer=model.optimizer,
            attention=model.kernel.name,
        )

    checkpoint = publish_checkpoint(run.folder, run.progress.step, write, keep=run.saving.keep)
    copy_adapters(run.folder, checkpoint)


def add_validation(run: Run) -> bool:
    """Record a validation, and the best adapter, in the checkpoint of the same step, if any.

    Returns:
        True if there is such a checkpoint.
    """
    checkpoint = run_folder.newest_checkpoint(run.folder)
    if not checkpoint or run_folder.step_of(checkpoint) != run.progress.step:
        return False
    with writing(checkpoint, then=_go_on(checkpoint)):
        _keep_best(run.folder, checkpoint, run.progress)
        checkpoints.replace_progress(checkpoint, run.progress)
    return True


def copy_adapters(run_dir: Path, checkpoint: Path) -> None:
    """Copy a checkpoint's adapters to the root of the run; diffusers loads them from there.

    A run that continues calls this too: it may have been killed after publishing the checkpoint.
    """
    for part in (Path(), Path(run_folder.EMA_NAME)):
        source, target = (
            checkpoint / part / run_folder.ADAPTER_NAME,
            run_dir / part / run_folder.ADAPTER_NAME,
        )
        if not source.exists():
            continue
        data = source.read_bytes()
        if target.exists() and target.read_bytes() == data:
            continue
        with writing(target, then=_go_on(checkpoint)):
            target.parent.mkdir(exist_ok=True)
            write_atomic(target, data)


def save_best(model: TrainedModel, run: Run, weights: str) -> None:
    """Write the adapter of the best validation so far.

    Args:
        model: The trained model.
        run: Its run.
        weights: The weights that were measured: `ADAPTER` or `EMA`.
    """
    _write_adapter(run.folder / run_folder.BEST_NAME, model, run, weights)


def restore_best(
    run_dir: Path, checkpoint: Path | None, progress: Progress, panel: str | None
) -> Progress:
    """Reconcile `best/` with the progress of a run that starts or continues.

    A run may have been killed after it wrote a newer best than its checkpoint has. The steps to
    that one are done again.

    Args:
        run_dir: The run's folder.
        checkpoint: The run continues from it; None for a new run.
        progress: The checkpoint's; changed.
        panel: Key of the held-out panel; None without one.

    Returns:
        The progress.
    """
    best = run_dir / run_folder.BEST_NAME / run_folder.ADAPTER_NAME
    if checkpoint and progress.best_step is not None:
        kept = checkpoint / run_folder.BEST_NAME / run_folder.ADAPTER_NAME
        if kept.exists() and not _is_best(best, progress):
            with writing(best, then=_go_on(checkpoint)):
                best.parent.mkdir(exist_ok=True)
                write_atomic(best, kept.read_bytes())
    if panel is not None and progress.panel != panel:
        if progress.best_step is not None:
            logger.warning(
                "validation changed since step %d (clips, settings, model or release): the best "
                "adapter, patience and the overfitting check start again%s",
                progress.best_step, _set_aside(best, progress.step),
            )  # fmt: skip
        progress.forget_best()
        progress.panel, progress.validated_step = panel, None
    elif progress.best_step is not None and not _is_best(best, progress):
        logger.warning(
            "the best adapter, of step %d, is missing: the search for it starts again%s",
            progress.best_step, _set_aside(best, progress.step),
        )  # fmt: skip
        progress.forget_best()
    if progress.best_step is None:
        best.unlink(missing_ok=True)  # of steps that are done again
    return progress


class SaveTimer:
    """Time since the last checkpoint, or since the start of training.

    Args:
        minutes: Maximum time without a checkpoint; 0 = no limit.
    """

    def __init__(self, minutes: float) -> None:
        self._limit_s = 60 * minutes if minutes else math.inf
        self.restart()

    def restart(self) -> None:
        """Start again: a checkpoint was saved now."""
        self._since = time.monotonic()

    def is_due(self) -> bool:
        """Return whether a checkpoint is due."""
        return time.monotonic() - self._since >= self._limit_s


def is_due(run: Run, steps_per_epoch: Fraction) -> bool:
    """Return whether the number of steps done requires a checkpoint now."""
    done, every = run.progress.step, run.saving.every
    if done == run.end_step or (every and done % every == 0):
        return True
    ends_epoch = done // steps_per_epoch > (done - 1) // steps_per_epoch
    return run.saving.every_epoch and ends_epoch


def _write_adapter(folder: Path, model: TrainedModel, run: Run, weights: str) -> None:
    save_adapter(
        folder / run_folder.ADAPTER_NAME,
        _tensors(model, weights),
        model.shape,
        provenance={**run.facts, "step": str(run.progress.step), "weights": weights},
    )


def _tensors(model: TrainedModel, weights: str) -> Mapping[str, Tensor]:
    if weights == ADAPTER:
        return model.masters.parameters
    assert model.average
    return model.average.tensors


def _keep_best(run_dir: Path, checkpoint: Path, progress: Progress) -> None:
    """Keep `best/` in a checkpoint, as a hard link if the disk supports them: it takes no space."""
    if progress.best_step is None:
        return
    source = run_dir / run_folder.BEST_NAME / run_folder.ADAPTER_NAME
    target = checkpoint / run_folder.BEST_NAME / run_folder.ADAPTER_NAME
    if not source.exists():  # moved by the user; the checkpoint is still good
        logger.warning(
            "%s, of step %d, is missing, so this checkpoint does not hold it",
            source, progress.best_step,
        )  # fmt: skip
        return
    target.parent.mkdir(exist_ok=True)
    if target.exists() and target.samefile(source):
        return
    temporary = partial_path(target)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    publish(temporary, target)


def _is_best(file: Path, progress: Progress) -> bool:
    """Return whether an adapter is the one that the progress names as the best."""
    try:
        facts = read_adapter(file).provenance
    except AdapterError:
        return False
    wanted = (str(progress.best_step), progress.best_weights)
    return (facts.get("step"), facts.get("weights")) == wanted


def _set_aside(best: Path, step: int) -> str:
    """Rename `best/` if it has an adapter; return a clause that names the new folder."""
    if not best.exists():
        return ""
    target = best.parent.with_name(f"{run_folder.BEST_NAME}-before-step-{step:06d}")
    shutil.rmtree(target, ignore_errors=True)
    best.parent.rename(target)
    return f"; the one so far is kept in {target}"


def _go_on(checkpoint: Path) -> str:
    command = run_folder.resume_command(checkpoint.parent.parent)
    return f"continue with: {command}; checkpoint {checkpoint} is complete"
