"""A run's folder in outputs/: what is in it, and how it stays whole.

    config.toml                          the resolved settings, and what was trained on
    metrics.jsonl                        one object a step
    pytorch_lora_weights.safetensors     the newest adapter, where diffusers looks for it
    checkpoints/step-000500/             what resume needs

Owns: names, atomic publication, and the choice of what to resume. Must not know what is inside a
checkpoint. Killed at any instruction, every file and checkpoint is whole or not there.
"""

import json
import os
import shutil
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from wanlora.core.fingerprint import difference
from wanlora.errors import RunError
from wanlora.files import fsync_dir, write_atomic

ADAPTER_NAME = "pytorch_lora_weights.safetensors"
CONFIG_NAME = "config.toml"
METRICS_NAME = "metrics.jsonl"
CHECKPOINTS_NAME = "checkpoints"

# Settings that may change when a run continues: they decide how far or how it runs, not what it is.
FREE_ON_RESUME = frozenset(
    {
        "max_steps", "num_epochs", "save_steps", "keep_checkpoints", "resume", "device",
        "gradient_checkpointing", "prefetch_batches", "output_dir", "cache", "allow_untrained_base",
    }
)  # fmt: skip


def open_run(run_dir: Path, settings: Mapping[str, Any], *, resume: bool) -> Path | None:
    """Make or check a run's folder, and return the checkpoint to continue from, if any.

    Raises:
        RunError: The folder holds a run and `resume` was not asked for, or it holds a run of other
            settings.
    """
    checkpoint = newest_checkpoint(run_dir)
    if not resume and (checkpoint or (run_dir / ADAPTER_NAME).exists()):
        raise RunError(
            f"{run_dir} already holds a run (newest checkpoint: "
            f"{checkpoint.name if checkpoint else 'none, a finished adapter'}): add --resume to "
            "continue it, or choose another --output-dir"
        )
    config_path = run_dir / CONFIG_NAME
    if checkpoint and config_path.exists():
        recorded = tomllib.loads(config_path.read_text())
        differing = difference(_identity(recorded), _identity(_without_none(settings)))
        if differing:
            raise RunError(
                f"{run_dir} is a run of other settings, so it cannot be continued:\n  "
                + "\n  ".join(differing)
                + "\nuse the settings found there, or start anew in another --output-dir"
            )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(config_path, tomli_w.dumps(_without_none(settings)).encode())
    return checkpoint


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Checkpoint of the highest step, or None."""
    found = checkpoints(run_dir)
    return found[-1] if found else None


def checkpoints(run_dir: Path) -> list[Path]:
    """Published checkpoints by step; a folder still being written has another name."""
    found = (run_dir / CHECKPOINTS_NAME).glob("step-[0-9]*")
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def publish_checkpoint(
    run_dir: Path, step: int, write: Callable[[Path], None], *, keep: int
) -> Path:
    """Write a checkpoint into a hidden folder, rename it into place, then drop the oldest.

    Args:
        run_dir: The run's folder.
        step: Steps done.
        write: Fills the folder it is given.
        keep: Newest checkpoints to keep; 0 = all.
    """
    parent = run_dir / CHECKPOINTS_NAME
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(".*.partial"):
        shutil.rmtree(leftover)
    final = parent / f"step-{step:06d}"
    temporary = parent / f".{final.name}.partial"
    temporary.mkdir()
    try:
        write(temporary)
        for file in temporary.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        fsync_dir(temporary)
        if final.exists():  # the same step again, after a resume
            shutil.rmtree(final)
        temporary.rename(final)
        fsync_dir(parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"cannot write checkpoint {final}: {error.strerror or error}; the one before it is "
            "untouched. Make room or access, then continue with --resume"
        ) from error
    if keep:
        for old in checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)
    return final


def append_metrics(run_dir: Path, row: Mapping[str, Any]) -> None:
    """Add one step's figures; a line torn by a kill is cut off by the next resume."""
    with (run_dir / METRICS_NAME).open("a") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def truncate_metrics(run_dir: Path, num_steps: int) -> None:
    """Forget the steps that a resumed run will do again, and a line torn by a kill."""
    path = run_dir / METRICS_NAME
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines[:num_steps] if line.endswith("\n")]
    write_atomic(path, "".join(kept).encode())


def _identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in FREE_ON_RESUME}


def _without_none(value: Any) -> Any:
    """TOML has no null: a setting left to its default reading is left out."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return str(value) if isinstance(value, Path) else value
