"""What a diffusers user gets from a model and an adapter, without a line of wanlora."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline


def plain_diffusers(
    model: Path, prompt: str, adapter: Path | None = None, *, seed: int = 0, **settings: Any
) -> np.ndarray:
    """Make a video with `WanPipeline` and its own adapter loader, as 8-bit frames."""
    pipeline = WanPipeline.from_pretrained(model)
    if adapter:
        pipeline.load_lora_weights(str(adapter))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompt, generator=torch.Generator("cpu").manual_seed(seed), output_type="pil", **settings
    ).frames[0]
    return np.stack([np.asarray(image) for image in images])
