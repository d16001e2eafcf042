"""Stage two: train a LoRA on cached latents. Loads the transformer and nothing else.

loop.py         run(): refusals, set-up, and the training loop
session.py      everything a run needs before its first step
ranks.py        the processes of a run: what they agree on, and which one is lost
checkpoints.py  what resume needs, to and from disk
"""

from wanlora.train.loop import TrainResult, run

__all__ = ["TrainResult", "run"]
