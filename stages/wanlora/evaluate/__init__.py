"""`wanlora evaluate`: base model against adapters, by held-out loss and by videos.

stage.py      what is measured and written, in order
setup.py      what all models share: clips, noise, weights, sizes
subjects.py   which adapters are compared, and what they are called
losses.py     the loss of each model on the same clips, and what the tables say
videos.py     the videos of each model from the same noise; measures of them
"""

from wanlora.evaluate.stage import run

__all__ = ["run"]
