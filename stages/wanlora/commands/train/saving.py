"""What a run writes while it trains: checkpoints, the newest, best and averaged adapter.

Owns: which file appears when, and that `best/` is the adapter that the progress names. How a file
appears is `runs`' and `files`' business.
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from wanlora.adapters.file import read_adapter, save_adapter
from wanlora.commands.train.session import Session
from wanlora.config import TrainConfig
from wanlora.errors import AdapterError
from wanlora.files import partial_path, publish, write_atomic, writing
from wanlora.runs import checkpoints, run_folder
from wanlora.runs.checkpoints import Progress
from wanlora.runs.publish import publish_checkpoint
from wanlora.training.validation import ADAPTER, EMA

logger = logging.getLogger(__name__)


def save(config: TrainConfig, session: Session) -> None:
    """Publish a checkpoint, then its adapters at the root of the run."""

    def write(folder: Path) -> None:
        _write_adapter(folder, session, ADAPTER)
        if session.average:
            _write_adapter(folder / run_folder.EMA_NAME, session, EMA)
        _keep_best(config.output_dir, folder, session.progress)
        checkpoints.write_state(
            folder,
            progress=session.progress,
            identity=session.identity,
            facts=session.facts,
            masters=session.masters,
            optimizer=session.optimizer,
        )

    checkpoint = publish_checkpoint(
        config.output_dir, session.progress.step, write, keep=config.keep_checkpoints
    )
    show(config.output_dir, checkpoint)


def add_validation(config: TrainConfig, session: Session) -> bool:
    """Record a validation, and the best adapter, in the checkpoint of the same step, if any."""
    checkpoint = run_folder.newest_checkpoint(config.output_dir)
    if not checkpoint or run_folder.step_of(checkpoint) != session.progress.step:
        return False
    with writing(checkpoint, then=_go_on(checkpoint)):
        _keep_best(config.output_dir, checkpoint, session.progress)
        checkpoints.replace_progress(checkpoint, session.progress)
    return True


def show(run_dir: Path, checkpoint: Path) -> None:
    """Copy a checkpoint's adapters to the root of the run, where diffusers looks for them.

    Also done when a run continues: it may have been killed between publishing and this.
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


def save_best(config: TrainConfig, session: Session, weights: str) -> None:
    """Write the adapter of the best validation so far.

    Args:
        config: The run's settings.
        session: What is trained.
        weights: `ADAPTER` or `EMA`: the ones that were measured.
    """
    _write_adapter(config.output_dir / run_folder.BEST_NAME, session, weights)


def restore_best(
    run_dir: Path, checkpoint: Path | None, progress: Progress, panel: str | None
) -> Progress:
    """Make `best/` and the progress of a run that starts or continues agree.

    A run may have been killed after a newer best than its checkpoint's: that one is made again.

    Args:
        run_dir: The run's folder.
        checkpoint: What the run continues from.
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
                progress.best_step, _put_aside(best, progress.step),
            )  # fmt: skip
        progress.forget_best()
        progress.panel, progress.validated_step = panel, None
    elif progress.best_step is not None and not _is_best(best, progress):
        logger.warning(
            "the best adapter, of step %d, is missing: the search for it starts again%s",
            progress.best_step, _put_aside(best, progress.step),
        )  # fmt: skip
        progress.forget_best()
    if progress.best_step is None:
        best.unlink(missing_ok=True)  # of steps that are done again
    return progress


class SaveTimer:
    """Time since the last checkpoint, or since the start of training.

    Args:
        minutes: Longest time without a checkpoint; 0 = any.
    """

    def __init__(self, minutes: float) -> None:
        self._limit_s = 60 * minutes if minutes else math.inf
        self.restart()

    def restart(self) -> None:
        """A checkpoint was saved now."""
        self._since = time.monotonic()

    def is_due(self) -> bool:
        """Return whether the time is over."""
        return time.monotonic() - self._since >= self._limit_s


def is_due(config: TrainConfig, session: Session) -> bool:
    """Whether a checkpoint is due now, after `session.progress.step` steps."""
    done = session.progress.step
    if done == session.end_step or (config.save_steps and done % config.save_steps == 0):
        return True
    epoch = session.data.source.order.steps_per_epoch
    ends_epoch = done // epoch > (done - 1) // epoch
    return config.save_every_epoch and ends_epoch


def _write_adapter(folder: Path, session: Session, weights: str) -> None:
    save_adapter(
        folder / run_folder.ADAPTER_NAME,
        _tensors(session, weights),
        session.shape,
        provenance=session.facts | {"step": str(session.progress.step), "weights": weights},
    )


def _tensors(session: Session, weights: str) -> Mapping[str, Tensor]:
    if weights == ADAPTER:
        return session.masters.parameters
    assert session.average
    return session.average.tensors


def _keep_best(run_dir: Path, checkpoint: Path, progress: Progress) -> None:
    """Keep `best/` in a checkpoint, as a hard link if the disk has them: it takes no room."""
    if progress.best_step is None:
        return
    source = run_dir / run_folder.BEST_NAME / run_folder.ADAPTER_NAME
    target = checkpoint / run_folder.BEST_NAME / run_folder.ADAPTER_NAME
    if not source.exists():  # moved by the user: no reason to lose the checkpoint
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
    """Whether an adapter is the one that the progress names as the best."""
    try:
        found = read_adapter(file).provenance
    except AdapterError:
        return False
    wanted = (str(progress.best_step), progress.best_weights)
    return (found.get("step"), found.get("weights")) == wanted


def _put_aside(best: Path, step: int) -> str:
    """Rename `best/` for good if it holds an adapter; return a clause that names the new folder."""
    if not best.exists():
        return ""
    target = best.parent.with_name(f"{run_folder.BEST_NAME}-before-step-{step:06d}")
    shutil.rmtree(target, ignore_errors=True)
    best.parent.rename(target)
    return f"; the one so far is kept in {target}"


def _go_on(checkpoint: Path) -> str:
    command = run_folder.resume_command(checkpoint.parent.parent)
    return f"continue with: {command}; checkpoint {checkpoint} is complete"
