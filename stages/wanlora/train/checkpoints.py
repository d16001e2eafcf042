"""What resume needs: adapter masters, optimizer tensors, and the step. Nothing else has state.

Owns: the files inside a checkpoint folder. Noise, sigma, dropout and order are functions of
(seed, step, slot), so no generator or loader state is saved.
"""

import json
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wanlora.core.fingerprint import difference
from wanlora.errors import AdapterError, CheckpointError
from wanlora.runs import ADAPTER_NAME
from wanlora.train.masters import Masters, load_optimizer_state, optimizer_state
from wanlora.wan.adapter import read_adapter

VERSION = 1
STATE_NAME = "state.json"
OPTIMIZER_NAME = "optimizer.pt"

logger = logging.getLogger(__name__)


def write_state(
    folder: Path,
    *,
    step: int,
    identity: Mapping[str, Any],
    masters: Masters,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write the optimizer's tensors and the state beside an adapter file already in the folder.

    Args:
        folder: Hidden folder that becomes the checkpoint.
        step: Steps done: the step that comes next.
        identity: What the run trains on; a resume with another is refused.
        masters: The master weights, whose order names the optimizer's state.
        optimizer: The optimizer over them.
    """
    torch.save(optimizer_state(masters, optimizer), folder / OPTIMIZER_NAME)
    state = {
        "version": VERSION,
        "step": step,
        "identity": dict(identity),
        # Normal streams are not promised across numpy versions (NEP 19).
        "numpy": np.__version__,
        "torch": torch.__version__,
    }
    (folder / STATE_NAME).write_text(json.dumps(state, indent=2) + "\n")


def load(
    folder: Path,
    *,
    identity: Mapping[str, Any],
    masters: Masters,
    optimizer: torch.optim.Optimizer,
) -> int:
    """Take masters and optimizer tensors from a checkpoint and return the step that comes next.

    Raises:
        CheckpointError: A file or tensor is missing or damaged, or the checkpoint was trained on
            other clips or encodings.
    """
    try:
        state = json.loads((folder / STATE_NAME).read_text())
        if state["version"] != VERSION:
            raise CheckpointError(f"its version is {state['version']}, expected {VERSION}")
        _check_identity(state["identity"], identity)
        _warn_of_versions(state)
        tensors = read_adapter(folder / ADAPTER_NAME).tensors
        masters.load(tensors)
        saved = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        load_optimizer_state(masters, optimizer, saved)
        return int(state["step"])
    except (
        CheckpointError, AdapterError, OSError, ValueError, KeyError, RuntimeError, EOFError,
        pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"checkpoint {folder} cannot be continued: {error}. Remove that folder to continue "
            "from the one before it"
        ) from error


def _check_identity(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = difference(found, wanted)
    if differing:
        raise CheckpointError("it was trained on something else:\n  " + "\n  ".join(differing))


def _warn_of_versions(state: Mapping[str, Any]) -> None:
    for name, version in (("numpy", np.__version__), ("torch", torch.__version__)):
        if state[name] != version:
            logger.warning(
                "the checkpoint was written with %s %s, this is %s: the run continues, but not "
                "necessarily bit for bit", name, state[name], version,
            )  # fmt: skip
