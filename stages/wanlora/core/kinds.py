"""Kinds of encodings of a clip.

Owns: their names. Must not know: how they are stored or computed.
"""

from typing import Literal

Kind = Literal["latents", "text", "cond_latents", "clip_vision"]
"""Latents of the clip, embeddings of its prompts, and for image-to-video models: latents of the
first frame followed by grey ones, and CLIP embeddings of the first frame."""
