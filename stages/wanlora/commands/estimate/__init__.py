"""`wanlora estimate`: time, memory and disk of a run, before it starts."""

from wanlora.commands.estimate.estimate import run
from wanlora.commands.estimate.table import EstimateResult

__all__ = ["EstimateResult", "run"]
