"""Stage two: train a LoRA on cached latents. Loads the transformer and nothing else.

loop.py         run(): refusals, set-up, and the training loop
batches.py      which clips, sigmas, noise and prompts a slot gets; reading ahead
masters.py      fp32 master weights and their gradients
checkpoints.py  what resume needs, to and from disk
"""

from wanlora.train.loop import TrainResult, run

__all__ = ["TrainResult", "run"]
