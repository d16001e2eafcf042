"""State for resuming: adapter masters, optimizer tensors, the step, and the best validation.

Owns: the files inside a checkpoint folder. Noise, sigma, dropout and order are functions of
(seed, step, slot), so the state of generators and loaders is not saved.
"""

import json
import logging
import pickle
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wanlora.adapters.file import read_adapter
from wanlora.core.fingerprint import difference
from wanlora.core.out_of_memory import is_out_of_memory
from wanlora.errors import AdapterError, CheckpointError
from wanlora.files import write_atomic
from wanlora.runs import run_folder
from wanlora.training.masters import Masters, MovingAverage
from wanlora.training.optimizers import load_state, state_of

VERSION = 2
READABLE = (1, 2)
"""Version 1 has no `base` in its identity, no `best/`, and no panel in its progress."""
STATE_NAME = "state.json"
OPTIMIZER_NAME = "optimizer.pt"

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
        step: Steps done, which is also the number of the next step.
        validated_step: Steps done at the last complete validation.
        panel: Key of the held-out panel of the best validation.
        best_step: Steps done at the best validation; None before the first.
        best_loss: Held-out loss of the best validation.
        best_weights: Weights with that loss: `adapter` or `ema`.
        stale: Validations since the best one.
    """

    step: int = 0
    validated_step: int | None = None
    panel: str | None = None
    best_step: int | None = None
    best_loss: float | None = None
    best_weights: str | None = None
    stale: int = 0

    def forget_best(self) -> None:
        """Start the search for the best adapter again."""
        self.best_step = self.best_loss = self.best_weights = None
        self.stale = 0


def write_state(
    folder: Path,
    *,
    progress: Progress,
    identity: Mapping[str, Any],
    facts: Mapping[str, Any],
    masters: Masters,
    optimizer: torch.optim.Optimizer,
    attention: str,
) -> None:
    """Write the optimizer's tensors and the state beside an adapter file already in the folder.

    Args:
        folder: Hidden folder that becomes the checkpoint.
        progress: Progress of the run.
        identity: Data and base model of the run; a resume with others is refused.
        facts: Origin of the run; recorded, not compared.
        masters: The master weights.
        optimizer: Their optimizer.
        attention: Attention kernel of the run; a run that continues keeps it.
    """
    # Opened by Python: torch does not report why it cannot write.
    with (folder / OPTIMIZER_NAME).open("wb") as file:
        torch.save(state_of(optimizer, masters.parameters), file)
    state = {
        "version": VERSION,
        "progress": asdict(progress),
        "identity": dict(identity),
        "facts": dict(facts),
        "attention": attention,
        # Normal draws may differ between numpy versions (NEP 19).
        "numpy": np.__version__,
        "torch": torch.__version__,
    }
    (folder / STATE_NAME).write_text(json.dumps(state, indent=2) + "\n")


def recorded_attention(folder: Path) -> str | None:
    """Attention kernel of a checkpoint's run; None in checkpoints of release 0.1.0.

    Raises:
        CheckpointError: The state is missing or damaged.
    """
    with _damage_named(folder):
        kernel = json.loads((folder / STATE_NAME).read_text()).get("attention")
        return None if kernel is None else str(kernel)


def recorded_shift(folder: Path) -> float | None:
    """Shift of sigma of a checkpoint's run; None in checkpoints of release 0.1.0.

    Raises:
        CheckpointError: The state is missing or damaged.
    """
    with _damage_named(folder):
        shift = json.loads((folder / STATE_NAME).read_text())["facts"].get("shift")
        return None if shift is None else float(shift)


def replace_progress(folder: Path, progress: Progress) -> None:
    """Record a later validation in a published checkpoint."""
    state = json.loads((folder / STATE_NAME).read_text())
    state |= {"version": VERSION, "progress": asdict(progress)}
    write_atomic(folder / STATE_NAME, (json.dumps(state, indent=2) + "\n").encode())


def load(
    folder: Path,
    *,
    identity: Mapping[str, Any],
    masters: Masters,
    average: MovingAverage | None,
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Load masters, their average and optimizer tensors from a checkpoint.

    Raises:
        CheckpointError: A file or tensor is missing or damaged, or the checkpoint is of another
            release, or was trained on other clips or encodings.
    """
    with _damage_named(folder):
        state = json.loads((folder / STATE_NAME).read_text())
        version, trained_on = state["version"], dict(state["identity"])
    _check_version(folder, version)
    _check_identity(folder, trained_on, identity)
    with _damage_named(folder):
        _warn_of_versions(state)
        masters.load(read_adapter(folder / run_folder.ADAPTER_NAME).tensors)
        if average:
            average.load(read_adapter(folder / run_folder.EMA_NAME).tensors)
        saved = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        load_state(optimizer, masters.parameters, saved)
        return Progress(**state["progress"])


@contextmanager
def _damage_named(folder: Path) -> Generator[None, None, None]:
    """Translate errors of reading a damaged file inside the block.

    Raises:
        CheckpointError: Names the folder, and another checkpoint to continue from.
    """
    try:
        yield
    except (
        CheckpointError, AdapterError, OSError, ValueError, KeyError, RuntimeError, EOFError,
        TypeError, pickle.UnpicklingError,
    ) as error:  # fmt: skip
        if is_out_of_memory(error):  # the checkpoint is good, and must not be removed
            raise
        raise CheckpointError(
            f"checkpoint {folder} cannot be continued: {error}. {_alternative(folder)}"
        ) from error


def _alternative(folder: Path) -> str:
    """Advise what to continue instead of a damaged checkpoint."""
    run_dir = folder.parent.parent
    if any(
        run_folder.step_of(other) < run_folder.step_of(folder)
        for other in run_folder.checkpoints(run_dir)
    ):
        return "Remove that folder to continue from the checkpoint before it"
    return (
        "It is the only checkpoint: start a new --output-dir, from the adapter of this run with "
        f"--init-adapter {run_dir}"
    )


def _check_version(folder: Path, version: Any) -> None:
    if version not in READABLE:
        raise CheckpointError(
            f"checkpoint {folder} has version {version}, expected {VERSION}: continue it with the "
            "release that wrote it, or start a new --output-dir from its adapter with "
            f"--init-adapter {folder}"
        )


def _check_identity(folder: Path, trained_on: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse other clips or encodings; the checkpoint is good and must not be removed."""
    # Version 1 has no fingerprint of the base.
    differing = difference(trained_on, {key: wanted[key] for key in wanted if key in trained_on})
    if differing:
        raise CheckpointError(
            f"checkpoint {folder} was trained on something else:\n  "
            + "\n  ".join(differing)
            + "\nTo continue it, restore the manifest and make its view again, with the same model "
            f"({trained_on.get('variant')}) and a name of its own: run wanlora cache-latents "
            "--model MODEL --view NAME, and resume with --view NAME. To train on what the view "
            f"holds now, start a new --output-dir from its adapter with --init-adapter {folder}"
        )


def _warn_of_versions(state: Mapping[str, Any]) -> None:
    for name, version in (("numpy", np.__version__), ("torch", torch.__version__)):
        if state[name] != version:
            logger.warning(
                "the checkpoint was written with %s %s, this is %s: the run continues, but not "
                "necessarily bit for bit", name, state[name], version,
            )  # fmt: skip
