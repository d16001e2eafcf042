"""`wanlora sample`: prompts to videos, with adapters or without; or saved latents to mp4."""

from typing import TYPE_CHECKING

from wanlora.commands.sample import preflight
from wanlora.config import SampleConfig

if TYPE_CHECKING:
    from wanlora.commands.sample.sample import SampleResult

__all__ = ["run"]


def run(config: SampleConfig) -> "SampleResult":
    """Check everything that needs no model, then make the videos.

    Raises:
        WanloraError: A setting, the device, the model or an adapter cannot be used.
    """
    videos = preflight.check(config)
    from wanlora.commands.sample import sample  # noqa: PLC0415  (imports torch and diffusers)

    return sample.run(config, videos)
