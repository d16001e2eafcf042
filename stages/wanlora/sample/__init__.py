"""`wanlora sample`: prompts to videos, with adapters or without; or saved latents to mp4.

stage.py     what is loaded and made, in order
videos.py    which videos: their prompts, seeds and names; what is already there
decode.py    previews of a run through the VAE
"""

from wanlora.sample.stage import run

__all__ = ["run"]
