"""`wanlora estimate`: what a run will take, before a GPU hour is spent on it.

stage.py    run(): counts for a set of clips and a card
probe.py    real steps on a device of this machine
result.py   what is said of them
"""

from wanlora.estimate.result import EstimateResult
from wanlora.estimate.stage import run

__all__ = ["EstimateResult", "run"]
