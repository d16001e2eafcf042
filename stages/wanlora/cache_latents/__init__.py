"""Stage one: encode every clip and caption once, into the store.

stage.py      run(): the order of things, and the view; encode_rows() for what a view has lost
result.py     what the command prints and returns
plan.py       what there is to encode: hashes, keys, provenances, sizes
hashes.py     hashes of sources and encoders that earlier runs computed
turns.py      a lock, so that processes of one machine load UMT5 one after the other
worker.py     what one worker does, whoever started it
preview_prompts.py  embeddings of single prompts, for previews of training
walk.py       which rows a rank takes next: whatever nobody has committed
processes.py  workers on this machine, a process each
on_ray.py     workers on a cluster: actors, and tasks that decode for them
board.py      who of those actors makes what
pipeline.py   threads that decode ahead of the encoder and write behind it
encode.py     the two encoders at work, and the check that they are the right ones
decode.py     a clip to frames, or to what is wrong with it
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wanlora.cache_latents.result import CacheResult
    from wanlora.cache_latents.stage import encode_rows, run

__all__ = ["CacheResult", "encode_rows", "run"]


def __getattr__(name: str) -> Any:
    """Import the stage when it is asked for: a process that only decodes needs no encoder."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from wanlora.cache_latents import result, stage  # noqa: PLC0415

    return result.CacheResult if name == "CacheResult" else getattr(stage, name)
