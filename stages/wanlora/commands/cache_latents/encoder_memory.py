"""Memory of the encoders: freeing it, and the error if there is too little.

Owns: the advice in that error. `core.out_of_memory` recognizes the error.
"""

import gc
from contextlib import AbstractContextManager

import torch

from wanlora.core.out_of_memory import explained_out_of_memory


def explain_out_of_memory(what: str, *advice: str) -> AbstractContextManager[None]:
    """Replace out-of-memory errors inside the block by one with advice.

    Args:
        what: The work, as in "loading the VAE".
        advice: Options that save memory.

    Raises:
        DeviceError: The device or the machine has too little memory.
    """
    options = "; ".join(advice)
    return explained_out_of_memory(
        lambda reason: f"out of memory {what} ({reason}). Encoded rows are kept. Options: {options}"
    )


def half_memory(setting: str, dtype: str) -> list[str]:
    """Option that halves an encoder's memory; none if it is set already."""
    return [] if dtype == "bfloat16" else [f"--set {setting}=bfloat16 (half the memory)"]


def free_memory() -> None:
    """Free the memory of an encoder before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
