"""Stage two: train a LoRA on cached latents. Loads the transformer and nothing else.

resume.py       the settings of a run that is continued
preflight.py    checks that need no torch
loop.py         the training loop
session.py      everything a run needs before its first step
ranks.py        the processes of a run: what they agree on, and which one is lost
checkpoints.py  what resume needs, to and from disk
"""

from typing import TYPE_CHECKING

from wanlora.config import TrainConfig
from wanlora.train import preflight
from wanlora.train.resume import continued

if TYPE_CHECKING:
    from wanlora.train.loop import TrainResult

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
    from wanlora.train import loop  # noqa: PLC0415  (imports torch and diffusers)

    return loop.run(config, view)
