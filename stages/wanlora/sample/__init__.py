"""`wanlora sample`: prompts to videos, with adapters or without; or saved latents to mp4.

preflight.py checks that need no torch
stage.py     what is loaded and made, in order
videos.py    which videos: their prompts, seeds and names; what is already there
decode.py    previews of a run through the VAE
"""

from typing import TYPE_CHECKING

from wanlora.config import SampleConfig
from wanlora.sample import preflight

if TYPE_CHECKING:
    from wanlora.sample.stage import SampleResult

__all__ = ["run"]


def run(config: SampleConfig) -> "SampleResult":
    """Check everything that needs no model, then make the videos.

    Raises:
        WanloraError: A setting, the device, the model or an adapter cannot be used.
    """
    videos = preflight.check(config)
    from wanlora.sample import stage  # noqa: PLC0415  (imports torch and diffusers)

    return stage.run(config, videos)
