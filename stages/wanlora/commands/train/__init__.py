"""Stage two: train a LoRA on cached latents. Loads the transformer and nothing else."""

from typing import TYPE_CHECKING

from wanlora.commands.train import preflight
from wanlora.commands.train.resume import continued
from wanlora.config import TrainConfig

if TYPE_CHECKING:
    from wanlora.commands.train.loop import TrainResult

__all__ = ["run"]


def run(config: TrainConfig) -> "TrainResult":
    """Train, or continue, the run in `config.output_dir`.

    Raises:
        WanloraError: Anything that makes the run impossible or pointless, before the first step;
            a non-finite loss or gradient, before the optimizer steps on it; another process of
            the run that is lost.
    """
    config = continued(config)
    view = preflight.check(config)
    from wanlora.commands.train import loop  # noqa: PLC0415  (imports torch and diffusers)

    return loop.run(config, view)
