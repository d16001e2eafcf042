"""Latents of one video in a file, for the VAE to decode later.

Owns: `previews/step-000500/00.safetensors` of a run: one tensor `latents`, and its prompt, seed and
model in the header. Legend: c f h w latents, normalised.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float32

from wanlora.adapters.header import PROVENANCE_PREFIX
from wanlora.errors import RunError
from wanlora.files import write_atomic

TENSOR = "latents"
REQUIRED = ("prompt", "seed", "model", "variant")


@dataclass(frozen=True, slots=True)
class SavedLatents:
    """Content of a file of latents.

    Attributes:
        path: The file.
        latents: Normalised latents, fp32.
        facts: Origin of the latents; always a prompt, its seed, the model and its variant.
    """

    path: Path
    latents: Float32[torch.Tensor, "c f h w"]
    facts: dict[str, str]


def write_latents(
    path: Path, latents: Float32[torch.Tensor, "c f h w"], facts: Mapping[str, object]
) -> None:
    """Write a file of latents atomically."""
    assert set(REQUIRED) <= facts.keys(), facts.keys()
    header = {f"{PROVENANCE_PREFIX}{key}": str(value) for key, value in facts.items()}
    tensors = {TENSOR: latents.contiguous()}
    write_atomic(path, safetensors.torch.save(tensors, {"format": "pt", **header}))


def read_latents(path: Path) -> SavedLatents:
    """Read a file of latents.

    Raises:
        RunError: The file is damaged, or is not a file of latents.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            header = opened.metadata() or {}
            names = set(opened.keys())
            latents = opened.get_tensor(TENSOR) if names == {TENSOR} else None
    except (OSError, safetensors.SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    facts = {
        key.removeprefix(PROVENANCE_PREFIX): value
        for key, value in header.items()
        if key.startswith(PROVENANCE_PREFIX)
    }
    if latents is None or latents.ndim != 4 or not set(REQUIRED) <= facts.keys():
        raise RunError(
            f"{path} is not a file of latents: expected one tensor {TENSOR!r} [C, F, H, W] and "
            f"{', '.join(REQUIRED)} in its header, as wanlora train writes under previews/; found "
            f"{', '.join(sorted(names)[:3]) or 'no tensors'}"
        )
    return SavedLatents(path, latents.float(), facts)
