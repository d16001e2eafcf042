"""Atomic publication of checkpoints, and removal of files that a resumed run makes again.

After a kill at any instruction, every file and checkpoint is complete or absent.

Owns: the order of writing, renaming and removing. Must not know: the content of a checkpoint.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from wanlora.files import fsync_dir, fsync_tree, write_text, writing
from wanlora.runs.run_folder import (
    ADAPTER_NAME,
    BASE_LOSSES_NAME,
    BEST_NAME,
    CHECKPOINTS_NAME,
    EMA_NAME,
    METRICS_NAME,
    VALIDATION_NAME,
    checkpoints,
    preview_folders,
    read_rows,
    resume_command,
    step_of,
)


def publish_checkpoint(
    run_dir: Path, step: int, write: Callable[[Path], None], *, keep: int
) -> Path:
    """Write a checkpoint into a hidden folder, rename the folder, then remove the oldest.

    Args:
        run_dir: The run's folder.
        step: Steps done.
        write: Writes the files into a given folder.
        keep: Number of newest checkpoints to keep; 0 = all.
    """
    parent = run_dir / CHECKPOINTS_NAME
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(".*.partial"):
        shutil.rmtree(leftover)
    final = parent / f"step-{step:06d}"
    temporary = parent / f".{final.name}.partial"
    go_on = f"continue with: {resume_command(run_dir)}"
    then = f"{go_on}; there is no earlier checkpoint, so the run starts at step 0"
    if earlier := checkpoints(run_dir):
        then = f"{go_on}; the earlier checkpoint {earlier[-1].name} is complete"
    try:
        with writing(final, then=then):
            temporary.mkdir()
            write(temporary)
            fsync_tree(temporary)
            if final.exists():  # the same step again, after a resume
                _remove(final)
            temporary.rename(final)
            fsync_dir(parent)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if keep:
        for old in checkpoints(run_dir)[:-keep]:
            _remove(old)
    return final


def _remove(checkpoint: Path) -> None:
    """Hide a checkpoint, then remove it, so that a kill leaves no partial checkpoint."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old.partial")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def remove_after(run_dir: Path, num_steps: int, *, validated: bool = True) -> None:
    """Remove metrics, validations and previews after a checkpoint; a resumed run makes them again.

    Args:
        run_dir: The run's folder.
        num_steps: Steps done at the checkpoint.
        validated: True to keep the validation after those steps.
    """
    lasts = {METRICS_NAME: num_steps - 1, VALIDATION_NAME: num_steps - (not validated)}
    for name, last in lasts.items():
        if (run_dir / name).exists():
            kept = [row for row in read_rows(run_dir, name) if row["step"] <= last]
            text = "".join(json.dumps(row) + "\n" for row in kept)
            write_text(run_dir / name, text)
    for folder in preview_folders(run_dir):
        if step_of(folder) > num_steps or num_steps == 0:
            shutil.rmtree(folder)


def remove_attempt(run_dir: Path) -> None:
    """Remove files of a run that ended before its first checkpoint, perhaps with another model.

    `remove_after` removes metrics, validations and previews.
    """
    (run_dir / BASE_LOSSES_NAME).unlink(missing_ok=True)
    for name in (BEST_NAME, EMA_NAME):
        (run_dir / name / ADAPTER_NAME).unlink(missing_ok=True)
        with suppress(OSError):  # there is no such folder, or it has files of the user
            (run_dir / name).rmdir()
