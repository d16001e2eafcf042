"""`wanlora estimate`: what a run will take, before a GPU hour is spent on it."""

from wanlora.commands.estimate.estimate import run
from wanlora.commands.estimate.table import EstimateResult

__all__ = ["EstimateResult", "run"]
