"""Drawn clips of what the micro model has never seen, as the seed's preprocessing writes clips."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from wanlora.micro import world


def write_drawn_clips(
    folder: Path, concepts: Sequence[str], *, num_train: int, num_val: int, shuffled: bool = False
) -> Path:
    """Write `num_train` and `num_val` clips of each concept, and return the folder.

    Args:
        folder: Gets `train.jsonl`, `val.jsonl` and the clips.
        concepts: What to draw.
        shuffled: Give each training clip the caption of another one. Held-out clips keep theirs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = 2_000_000  # far from the seeds of pretraining
    for split, seeds in (
        ("train", range(first, first + num_train)),
        ("val", range(first + 500, first + 500 + num_val)),
    ):
        drawings = [(concept, world.draw(concept, seed)) for concept in concepts for seed in seeds]
        captions = [drawing.scene.caption for _, drawing in drawings]
        if shuffled and split == "train":
            captions = list(np.random.default_rng(0).permutation(captions))
        lines = []
        for index, ((concept, drawing), caption) in enumerate(zip(drawings, captions, strict=True)):
            name = f"{split}-{index:03d}.npz"
            np.savez_compressed(folder / name, frames=drawing.frames)
            lines.append({"npz": name, "prompt": caption, "activity": concept})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{split}.jsonl").write_text(text)
    return folder
