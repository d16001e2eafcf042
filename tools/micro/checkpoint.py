"""Checkpoints of the pretraining: an interrupted one continues from the last saved step.

Owns: one file per model in training.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from wanlora.files import write_atomic


def save(path: Path, parts: Mapping[str, Any], step: int) -> None:
    """Write the states of all parts and the number of steps done."""
    file = io.BytesIO()
    torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, file)
    write_atomic(path, file.getvalue())


def resume(path: Path, parts: Mapping[str, Any]) -> int:
    """Load the states of all parts and return the number of steps done; 0 without a file."""
    if not path.exists():
        return 0
    states = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(states[name])
    return int(states["step"])
