"""The files of a run's folder in outputs/.

    config.toml                          the resolved settings; facts of the data in comments
    metrics.jsonl                        one object per step
    pytorch_lora_weights.safetensors     the newest adapter, at the path that diffusers loads
    checkpoints/step-000500/             state for --resume
    best/  ema/                          the adapter of the best validation; the moving average
    previews/step-000500/                latents and pictures made while training
    validation.jsonl                     one object per validation
    validation_base.json                 the base model's losses on the validation panels
    status.json  run.html                the state of the run; its page

Owns: names, lists and reading of these files. `claim` starts and continues a run, `publish`
publishes checkpoints, and `same_settings` compares settings. Must not know: the content of a
checkpoint.
"""

import json
import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanlora.errors import RunError
from wanlora.files import writing

ADAPTER_NAME = "pytorch_lora_weights.safetensors"
CONFIG_NAME = "config.toml"
METRICS_NAME = "metrics.jsonl"
VALIDATION_NAME = "validation.jsonl"
BASE_LOSSES_NAME = "validation_base.json"
BEST_NAME = "best"
EMA_NAME = "ema"
CHECKPOINTS_NAME = "checkpoints"
PREVIEWS_NAME = "previews"
CARD_NAME = "README.md"
STATUS_NAME = "status.json"
PAGE_NAME = "run.html"
LOCK_NAME = ".lock"


def resume_command(run_dir: Path) -> str:
    """Command that continues a run with its own settings."""
    return shlex.join(["wanlora", "train", "--output-dir", str(run_dir), "--resume"])


def is_run(run_dir: Path) -> bool:
    """Return whether a folder has a run, including one that ended before its first checkpoint.

    Without a checkpoint, config.toml must have the head that `begin_run` writes, and there must be
    another file of the run: a person may have copied config.toml.
    """
    if newest_checkpoint(run_dir):
        return True
    config_path = run_dir / CONFIG_NAME
    if not config_path.is_file() or not any(
        (run_dir / name).exists() for name in (LOCK_NAME, METRICS_NAME)
    ):
        return False
    return re.search(rb"^# wanlora: ", config_path.read_bytes(), re.MULTILINE) is not None


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Checkpoint of the highest step, or None."""
    found = checkpoints(run_dir)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    """Steps done, from the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(run_dir: Path) -> list[Path]:
    """Published checkpoints by step; a folder still being written has another name."""
    return _folders_of_steps(run_dir / CHECKPOINTS_NAME)


def preview_folders(run_dir: Path) -> list[Path]:
    """Folders of previews by step."""
    return _folders_of_steps(run_dir / PREVIEWS_NAME)


def newest_pictures(run_dir: Path) -> list[Path]:
    """Pictures of the newest previews; empty without previews."""
    folders = preview_folders(run_dir)
    return sorted(folders[-1].glob("*.gif")) if folders else []


def _folders_of_steps(folder: Path) -> list[Path]:
    found = folder.glob("step-*")
    named = [path for path in found if re.fullmatch(r"step-[0-9]+", path.name)]  # not step-5.bad
    return sorted(named, key=step_of)


def adapter_of(path: Path, checkpoint: str) -> Path:
    """Find one of a run's adapters.

    Args:
        path: A run's folder; or an adapter, for which only `latest` is valid.
        checkpoint: latest, best, ema, or a number of steps.

    Raises:
        RunError: The run has no such adapter; lists those it has.
    """
    if checkpoint == "latest":
        return path
    found = {
        name: path / name for name in (BEST_NAME, EMA_NAME) if (path / name / ADAPTER_NAME).exists()
    }
    found |= {str(step_of(each)): each for each in checkpoints(path)}
    wanted = str(int(checkpoint)) if checkpoint.isdecimal() else checkpoint
    if wanted not in found:
        raise RunError(
            f"{path} has no adapter {checkpoint}; it has: {', '.join(['latest', *found])}"
        )
    return found[wanted]


def append_row(run_dir: Path, name: str, row: Mapping[str, Any]) -> None:
    """Append a line to metrics.jsonl or validation.jsonl; a resume removes a partial line."""
    with (
        writing(run_dir / name, then=f"continue with: {resume_command(run_dir)}"),
        (run_dir / name).open("a") as file,
    ):
        file.write(json.dumps(row, allow_nan=False) + "\n")


def read_rows(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """Complete lines of metrics.jsonl or validation.jsonl; empty without the file."""
    path = run_dir / name
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_settings(run_dir: Path) -> dict[str, Any]:
    """Settings in a run's config.toml; empty without one.

    Raises:
        RunError: The file is not TOML.
    """
    path = run_dir / CONFIG_NAME
    if not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunError(
            f"{path} is not TOML ({error}), so its run cannot be continued: restore the file, or "
            "start again in another --output-dir"
        ) from None


def read_config(run_dir: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the settings of a run, and the facts at the head of its config.toml.

    Raises:
        RunError: The file is damaged.
    """
    path = run_dir / CONFIG_NAME
    if not path.exists():
        return {}, {}
    settings = read_settings(run_dir)
    head = [line[2:] for line in path.read_text("utf-8").splitlines() if line.startswith("# ")]
    return settings, dict(line.split(": ", 1) for line in head if ": " in line)


def read_status(run_dir: Path) -> dict[str, Any]:
    """Read status.json; empty if there is none or it is damaged."""
    try:
        return dict(json.loads((run_dir / STATUS_NAME).read_bytes()))
    except (OSError, ValueError):
        return {}


def out_of_patience(patience: int) -> str:
    """Reason why a run ended because `patience` validations found no new best."""
    return f"no new best in {patience} validations"
