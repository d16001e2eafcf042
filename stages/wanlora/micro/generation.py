"""Generate clips with the embedded model.

Owns: the sampling settings, which are those of the model's row in the table of variants.
Must not know: how the clips are judged. Dimensions: t frames, h and w pixels.
"""

from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from wanlora.wan.model_folder import MICRO
from wanlora.wan.pipeline import VideoSettings, generate
from wanlora.wan.variants import VARIANTS


class Maker(Protocol):
    """Function from a caption, a seed and, for image to video, a first frame to a clip."""

    def __call__(
        self, caption: str, seed: int, image: UInt8[np.ndarray, "h w 3"] | None = None
    ) -> UInt8[np.ndarray, "t h w 3"]:
        """Make a clip."""


def clip_maker(pipeline: Any) -> Maker:
    """Return a function that makes clips with the pipeline of an embedded model."""
    row = VARIANTS[MICRO]
    usual = row.defaults
    settings = VideoSettings(
        num_frames=usual.num_frames, height=usual.height, width=usual.width, steps=usual.steps,
        guidance_scale=row.part(None).guidance_scale, negative_prompt=usual.negative_prompt,
    )  # fmt: skip
    return lambda caption, seed, image=None: generate(
        pipeline, caption, settings, image=image, seed=seed
    )
