"""`wanlora evaluate`: base model against adapters, by held-out loss and by videos."""

from typing import TYPE_CHECKING

from wanlora.commands.evaluate import preflight
from wanlora.config import EvaluateConfig

if TYPE_CHECKING:
    from wanlora.commands.evaluate.evaluate import EvaluateResult

__all__ = ["run"]


def run(config: EvaluateConfig) -> "EvaluateResult":
    """Compare the base model with every adapter, by loss and by videos.

    Raises:
        WanloraError: A setting, the cache, the device, the model or an adapter cannot be used.
    """
    view = preflight.check(config)
    from wanlora.commands.evaluate import evaluate  # noqa: PLC0415  (imports torch and diffusers)

    return evaluate.run(config, view)
