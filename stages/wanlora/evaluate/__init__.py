"""`wanlora evaluate`: base model against adapters, by held-out loss and by videos.

preflight.py  checks that need no torch
stage.py      what is measured and written, in order
setup.py      what all models share: clips, noise, weights, sizes
subjects.py   which adapters are compared, and what they are called
losses.py     the loss of each model on the same clips, and what the tables say
plan.py       which videos each model makes, what they are called and cost
videos.py     making them, from the same noise
measures.py   what is said of them
"""

from typing import TYPE_CHECKING

from wanlora.config import EvaluateConfig
from wanlora.evaluate import preflight

if TYPE_CHECKING:
    from wanlora.evaluate.stage import EvaluateResult

__all__ = ["run"]


def run(config: EvaluateConfig) -> "EvaluateResult":
    """Compare the base model with every adapter, by loss and by videos.

    Raises:
        WanloraError: A setting, the cache, the device, the model or an adapter cannot be used.
    """
    view = preflight.check(config)
    from wanlora.evaluate import stage  # noqa: PLC0415  (imports torch and diffusers)

    return stage.run(config, view)
