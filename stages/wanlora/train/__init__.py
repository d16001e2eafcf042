"""Stage two: train a LoRA on cached latents. Loads the transformer and nothing else.

loop.py         run(): refusals, set-up, and the training loop
session.py      everything a run needs before its first step
checkpoints.py  what resume needs, to and from disk
"""

from wanlora.train.loop import TrainResult, run

__all__ = ["TrainResult", "run"]
