"""Generate clips with the embedded model.

Owns: the sampling settings, which are those of the model's row in the table of variants.
Must not know: how the clips are judged. Dimensions: t frames, h and w pixels.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8

from wanlora.wan.model_folder import MICRO
from wanlora.wan.pipeline import VideoSettings, generate
from wanlora.wan.variants import VARIANTS


def clip_maker(pipeline: Any) -> Callable[[str, int], UInt8[np.ndarray, "t h w 3"]]:
    """Return a function from (caption, seed) to a clip."""
    row = VARIANTS[MICRO]
    usual = row.defaults
    settings = VideoSettings(
        num_frames=usual.num_frames, height=usual.height, width=usual.width, steps=usual.steps,
        guidance_scale=row.part(None).guidance_scale, negative_prompt=usual.negative_prompt,
    )  # fmt: skip
    return lambda caption, seed: generate(pipeline, caption, settings, seed=seed)
