"""Stage one: encode every clip and caption once, into the store.

stage.py    run(): the order of things, and the view; encode_rows() for what a view has lost
result.py   what the command prints and returns
plan.py     what there is to encode: hashes, keys, provenances, sizes
pipeline.py threads that decode ahead of the encoder and write behind it
encode.py   the two encoders at work, and the check that they are the right ones
"""

from wanlora.cache_latents.result import CacheResult
from wanlora.cache_latents.stage import encode_rows, run

__all__ = ["CacheResult", "encode_rows", "run"]
