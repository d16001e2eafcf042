"""How alike two pictures are.

Owns: image measures on uint8 arrays.
"""

import math

import numpy as np
from jaxtyping import UInt8


def psnr(a: UInt8[np.ndarray, "..."], b: UInt8[np.ndarray, "..."]) -> float:
    """Peak signal-to-noise ratio 10 log10(255^2 / mean squared error) in dB; inf when equal."""
    assert a.shape == b.shape, (a.shape, b.shape)
    error = float(np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2, dtype=np.float64))
    return math.inf if error == 0 else 10.0 * math.log10(255.0**2 / error)
