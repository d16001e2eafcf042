"""Figures of a step, and the trackers that show them: TensorBoard, and optionally W&B.

Owns: the figures of speed and memory in a row of metrics.jsonl, and the trackers, which are
accelerate's. Trackers show a copy: metrics.jsonl, validation.jsonl and previews/ are complete.
"""

import importlib
import json
import resource
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from jaxtyping import UInt8

from wanlora.cost.gpus import mfu
from wanlora.errors import ConfigError
from wanlora.files import write_atomic, writing
from wanlora.runs import run_folder

SMOOTHING = 0.98
PROJECT = "wanlora"
TENSORBOARD_NAME = "tensorboard"
WANDB_NAME = "wandb"
WANDB_ID_NAME = "run-id.txt"


class Smoothed(NamedTuple):
    """Exponential moving mean m <- 0.98 m + 0.02 x, divided by its total weight 1 - 0.98^n so far.

    Without that division the first hundred values would be biased towards 0. An immutable value:
    a resumed run rebuilds it from the rows it keeps with `Smoothed().add_all(losses)`.
    """

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> "Smoothed":
        """Return the mean with one more value."""
        return Smoothed(
            SMOOTHING * self.total + (1 - SMOOTHING) * value,
            SMOOTHING * self.weight + (1 - SMOOTHING),
        )

    def add_all(self, values: Iterable[float]) -> "Smoothed":
        """Return the mean with more values."""
        result = self
        for value in values:
            result = result.add(value)
        return result

    @property
    def value(self) -> float | None:
        """The mean; None before the first value."""
        return self.total / self.weight if self.weight else None


def step_figures(
    *,
    loss: Smoothed,
    pace: Smoothed,
    seconds: float,
    waited_s: float,
    flops: float,
    device: torch.device,
    device_name: str,
    steps_left: int,
) -> dict[str, float | None]:
    """Compute the figures of a step's speed and memory.

    Args:
        loss: Smoothed losses, this step's included.
        pace: Smoothed seconds of a step, this step's included.
        seconds: The step's time.
        waited_s: Part of that time in which the step waited for data.
        flops: `StepFlops.model` of the clips that this process had in the step.
        device: Device that computed the step.
        device_name: Result of `device_name` for it.
        steps_left: Number of steps still to do.

    Returns:
        Columns of metrics.jsonl. `mfu` is None if no peak is known, for example on a CPU.
    """
    share = mfu(flops, seconds, device_name)
    return {
        "loss_smoothed": loss.value,
        "s_per_step": seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": share,
        "data_wait_pct": 100 * waited_s / seconds,
        "peak_memory_gb": peak_memory_bytes(device) / 1e9,
        "eta_s": steps_left * (pace.value or seconds),
    }


def device_name(device: torch.device) -> str:
    """Name of a device for `cost.gpus.mfu`; CUDA is slow to return it, so call this once."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of tensors on a GPU so far; on other devices, of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux


class Recorder:
    """Open trackers of one run, on the main process only.

    Args:
        run_dir: The run's folder: TensorBoard's files go to `tensorboard/`, W&B's to `wandb/`.
        trackers: `tensorboard`, `wandb`, both or none.
        settings: The run's settings.
        first_step: 0, or the first step of a resumed run; later points of an earlier process are
            replaced.

    Raises:
        ConfigError: See `check_trackers`.
    """

    def __init__(
        self,
        run_dir: Path,
        trackers: Sequence[str],
        settings: Mapping[str, Any],
        *,
        first_step: int,
    ) -> None:
        self._run_dir = run_dir
        self._go_on = f"continue with: {run_folder.resume_command(run_dir)}"
        PartialState()  # accelerate's trackers read the process index from it
        self._trackers: dict[str, Any] = {}
        for name in trackers:
            self._trackers[name] = _OPEN[name](run_dir, first_step)
        if first_step == 0 and (tensorboard := self._trackers.get("tensorboard")):
            text = json.dumps(dict(settings), indent=2, default=str)
            # As text: its hparams plug-in would add a second run beside this one.
            tensorboard.log({"settings": "    " + text.replace("\n", "\n    ")}, step=0)
        if wandb := self._trackers.get("wandb"):
            wandb.store_init_configuration(json.loads(json.dumps(dict(settings), default=str)))

    def step(self, row: Mapping[str, Any]) -> None:
        """Show the numbers in a row of metrics.jsonl."""
        values = {
            f"train/{key}": value
            for key, value in row.items()
            if key != "step" and isinstance(value, int | float)
        }
        self._log(values, step=int(row["step"] or 0))

    def validation(self, step: int, report: Mapping[str, Any]) -> None:
        """Show a line of validation.jsonl.

        Args:
            step: Steps done.
            report: With `split`, `weights`, `mean`, `base_mean`, `difference`, `standard_error`,
                `ci95`, `per_sigma` and `per_activity`.
        """
        split = report["split"] + ("_ema" if report.get("weights") == "ema" else "")
        values = {
            f"validation/{split}/{key}": report[key]
            for key in ("mean", "base_mean", "difference", "standard_error")
            if report.get(key) is not None
        }
        if interval := report.get("ci95"):
            values |= {
                f"validation/{split}/difference_{end}": value
                for end, value in zip(("low", "high"), interval, strict=True)
            }
        for sigma, loss, _base in report.get("per_sigma", ()):
            values[f"validation_by_sigma/{split}/{sigma:.3f}"] = loss
        for activity, (loss, _base) in report.get("per_activity", {}).items():
            values[f"validation_by_activity/{split}/{activity}"] = loss
        self._log(values, step=step)

    def images(self, step: int, name: str, frames: UInt8[np.ndarray, "n h w 3"]) -> None:
        """Show frames of a preview."""
        for kind, tracker in self._trackers.items():
            layout = {"dataformats": "NHWC"} if kind == "tensorboard" else {}
            with writing(self._run_dir / kind, then=self._go_on):
                tracker.log_images({name: frames}, step=step, **layout)

    def close(self) -> None:
        """Write buffered values, and close the trackers."""
        trackers, self._trackers = self._trackers, {}
        for kind, tracker in trackers.items():
            with writing(self._run_dir / kind, then=self._go_on):
                tracker.finish()

    def _log(self, values: Mapping[str, Any], *, step: int) -> None:
        for kind, tracker in self._trackers.items():
            with writing(self._run_dir / kind, then=self._go_on):
                tracker.log(dict(values), step=step)


def _open_tensorboard(run_dir: Path, first_step: int) -> GeneralTracker:
    # purge_step: TensorBoard drops later points of an earlier process that was killed.
    tracker = TensorBoardTracker(TENSORBOARD_NAME, str(run_dir), purge_step=first_step or None)
    tracker.start()
    return tracker


def check_trackers(trackers: Sequence[str]) -> None:
    """Refuse a tracker that does not work, before a model is loaded.

    Raises:
        ConfigError: W&B is not installed, or its import fails; with the error's text.
    """
    if WANDB_NAME not in trackers:
        return
    without = "leave it out with --set trackers='[\"tensorboard\"]'"
    missing = f"trackers: wandb is not installed: pip install wandb, or {without}"
    try:
        found = importlib.import_module("wandb")
    except Exception as error:  # a broken package may raise anything
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == WANDB_NAME
        broken = (
            f"trackers: wandb is installed, but its import fails ({type(error).__name__}: "
            f"{error}): pip install --upgrade wandb, or {without}"
        )
        raise ConfigError(missing if is_missing else broken) from error
    if not hasattr(found, "init"):  # a folder named wandb in the current one imports too
        raise ConfigError(missing)


def _open_wandb(run_dir: Path, first_step: int) -> GeneralTracker:
    """Start or continue a W&B run; its id is kept in the run's folder.

    W&B records each step once: after a kill it keeps the first values of steps that are done again,
    which are the same.
    """
    check_trackers([WANDB_NAME])
    id_path = run_dir / WANDB_NAME / WANDB_ID_NAME
    if not (first_step and id_path.exists()):
        id_path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(id_path, secrets.token_hex(8).encode())
    tracker = WandBTracker(
        PROJECT, dir=str(run_dir), name=run_dir.name, id=id_path.read_text(), resume="allow"
    )
    try:
        tracker.start()
    except Exception as error:  # no login, no network, or a broken package
        raise ConfigError(
            f"trackers: wandb does not start ({type(error).__name__}: {error}): log in with `wandb "
            "login`, or set WANDB_MODE=offline, or leave it out with --set "
            "trackers='[\"tensorboard\"]'"
        ) from error
    return tracker


_OPEN = {"tensorboard": _open_tensorboard, "wandb": _open_wandb}
