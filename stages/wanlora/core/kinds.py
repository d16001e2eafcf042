"""Kinds of rows that stage one encodes and stage two reads.

Owns: their names. Must not know: how a kind is stored (`store.schema.KINDS`) or encoded.
Legend: C, F, H, W = channels, frames, height, width of latents; L tokens of a prompt; D = width.
"""

from typing import Literal

Kind = Literal["latents", "text", "cond_latents", "clip_vision"]
"""Kind of a row:

- latents: a clip's latents `[C, F, H, W]`.
- text: a prompt's embedding `[L, D]`.
- cond_latents: latents of a clip's first frame followed by frames of value 0, `[C, F, H, W]`.
- clip_vision: CLIP's embedding of a clip's first frame, `[257, 1280]`.
"""
