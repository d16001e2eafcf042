"""`wanlora evaluate`: base model against adapters, by held-out loss and by videos.

stage.py      what is measured and written, in order
setup.py      what all models share: clips, noise, weights, sizes
subjects.py   which adapters are compared, and what they are called
losses.py     the loss of each model on the same clips, and what the tables say
plan.py       which videos each model makes, what they are called and cost
videos.py     making them, from the same noise
measures.py   what is said of them
"""

from wanlora.evaluate.stage import run

__all__ = ["run"]
