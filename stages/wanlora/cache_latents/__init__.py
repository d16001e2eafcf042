"""Stage one: encode every clip and caption once, into the store.

stage.py    run(): the order of things, the view, and what is said at the end
plan.py     what there is to encode: hashes, keys, provenances, sizes
pipeline.py threads that decode ahead of the encoder and write behind it
encode.py   the two encoders at work, and the check that they are the right ones
"""

from wanlora.cache_latents.stage import CacheResult, run

__all__ = ["CacheResult", "run"]
