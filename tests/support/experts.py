"""The miniature of Wan2.2's T2V-A14B: two transformers in one folder, one for each range of sigmas.

Owns: the folder. Its encoders, scheduler and shape are those of the embedded micro model, and its
transformers are micro's, each with small changes of its own; fine-tuning each on its range of
noise levels made no measurable difference to its loss there.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from wanlora.core.rng import Stream, generator
from wanlora.wan import model_folder

BOUNDARY = 0.875
"""The high-noise expert (`transformer`) is for sigma >= 0.875, `transformer_2` for lower sigmas."""

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def pair_folder(folder: Path) -> Path:
    """Write a diffusers folder of variant micro-a14b, and return it; about 8 MB.

    Args:
        folder: Folder that does not exist yet.
    """
    micro = model_folder.resolve(model_folder.MICRO, model_folder.PIPELINE)
    shutil.copytree(micro, folder, ignore=shutil.ignore_patterns("README.md"))
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    for seed, name in enumerate(("transformer", "transformer_2"), start=1):
        perturb(folder / name / WEIGHTS_NAME, seed)
    index = folder / "model_index.json"
    values = json.loads(index.read_text(encoding="utf-8"))
    values |= {"boundary_ratio": BOUNDARY, "transformer_2": values["transformer"]}
    index.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return folder


def perturb(file: Path, seed: int) -> None:
    """Change each weight by 1 % of its tensor's spread; a function of the seed."""
    tensors = load_file(file)
    for number, name in enumerate(sorted(tensors)):
        values = tensors[name].astype(np.float32)
        draws = generator(seed, Stream.INIT, number).standard_normal(values.shape, dtype=np.float32)
        changed = values + np.float32(0.01) * values.std() * draws
        tensors[name] = changed.astype(tensors[name].dtype)
    save_file(tensors, file, metadata={"format": "pt"})
