"""Stage two: train a LoRA on cached latents. Loads the transformer and nothing else."""

from typing import TYPE_CHECKING

from wanlora.commands.train import preflight
from wanlora.config import TrainConfig
from wanlora.config.run_settings import with_recorded

if TYPE_CHECKING:
    from wanlora.commands.train.train_result import TrainResult

__all__ = ["run"]


def run(config: TrainConfig) -> "TrainResult":
    """Train, or continue, the run in `config.output_dir`.

    Raises:
        WanloraError: Before the first step, if the run is impossible or pointless; before the
            optimizer step, if a loss or gradient is not finite; when another process of the run
            is lost.
    """
    config = with_recorded(config)
    selection = preflight.check(config)
    from wanlora.commands.train import loop, opening  # noqa: PLC0415  (imports torch and diffusers)
    from wanlora.runs.page import collected_warnings  # noqa: PLC0415

    with collected_warnings() as warnings:
        return loop.train(opening.open_session(config, selection), warnings)
