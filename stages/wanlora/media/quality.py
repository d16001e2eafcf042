"""Similarity of two pictures, and measures of a video that need no model.

Owns: measures on uint8 arrays, each with its formula and range. They detect a frozen, flickering,
blurred or collapsed video. They do not measure whether its content is right.
Legend: t frames, h w height and width, n videos; Y = luma in [0, 1], BT.709 weights.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

_LUMA = np.array((0.2126, 0.7152, 0.0722), np.float32)


def psnr(a: UInt8[np.ndarray, "..."], b: UInt8[np.ndarray, "..."]) -> float:
    """Peak signal-to-noise ratio 10 log10(255^2 / mean squared error) in dB; inf when equal."""
    assert a.shape == b.shape, (a.shape, b.shape)
    error = float(np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2, dtype=np.float64))
    return math.inf if error == 0 else 10.0 * math.log10(255.0**2 / error)


def luma(frames: UInt8[np.ndarray, "t h w 3"]) -> Float32[np.ndarray, "t h w"]:
    """Brightness of each pixel, in [0, 1]."""
    return np.stack([(frame.astype(np.float32) / 255) @ _LUMA for frame in frames])


def motion(brightness: Float32[np.ndarray, "t h w"]) -> float:
    """Mean change between consecutive frames: mean |Y[t+1] - Y[t]|, in [0, 1].

    0 for a frozen clip and for one frame. A moving person, a moving camera, a flicker and a cut
    all increase it.
    """
    return _over_frames(brightness, lambda a, b: float(np.abs(b - a).mean()), one_frame=0.0)


def consistency(brightness: Float32[np.ndarray, "t h w"]) -> float:
    """Mean correlation of consecutive frames Y[t] and Y[t+1], in [-1, 1].

    1 if frames differ only in brightness and contrast, 0 if they have nothing in common.
    Flicker and boiling texture lower it; so do a cut and very fast motion.
    """
    return _over_frames(brightness, _correlation, one_frame=1.0)


def sharpness(brightness: Float32[np.ndarray, "t h w"]) -> float:
    """Amount of fine structure: standard deviation of Y's Laplacian, mean over frames.

    0 for a flat picture, at most 4. Laplacian: sum of the 4 neighbours minus 4 times the pixel, for
    all pixels that have 4 neighbours (Pech-Pacheco et al. 2000 use its variance). Noise counts as
    structure.
    """
    spreads = [
        float(
            (y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * y[1:-1, 1:-1]).std(
                dtype=np.float64
            )
        )
        for y in brightness
    ]
    return float(np.mean(spreads))


def shrink(brightness: Float32[np.ndarray, "t h w"]) -> Float32[np.ndarray, "t h_8 w_8"]:
    """Mean of each 8x8 px block: a version of the video without detail."""
    num_frames, height, width = brightness.shape
    blocks = brightness[:, : height // 8 * 8, : width // 8 * 8]
    blocks = blocks.reshape(num_frames, height // 8, 8, width // 8, 8)
    return np.asarray(blocks.mean(axis=(2, 4)), np.float32)


def diversity(videos: Sequence[Float32[np.ndarray, "t h w"]]) -> float | None:
    """Mean difference of downscaled videos: RMS difference of Y, mean over pairs, in [0, 1].

    0 if all videos are the same, for example if an adapter ignores its prompts. Different
    backgrounds or colours count as much as different actions. None for fewer than two videos.
    """
    pairs = [
        math.sqrt(float(np.mean((a - b) ** 2, dtype=np.float64)))
        for a, b in combinations(videos, 2)
    ]
    return float(np.mean(pairs)) if pairs else None


def _over_frames(
    brightness: Float32[np.ndarray, "t h w"],
    measure: Callable[[Any, Any], float],
    *,
    one_frame: float,
) -> float:
    """Mean of a measure over successive frames."""
    pairs = [measure(a, b) for a, b in pairwise(brightness)]
    return float(np.mean(pairs)) if pairs else one_frame


def _correlation(a: Float32[np.ndarray, "h w"], b: Float32[np.ndarray, "h w"]) -> float:
    """Pearson correlation; 1 for two flat frames, 0 if only one of them is flat."""
    a, b = a - a.mean(dtype=np.float64), b - b.mean(dtype=np.float64)
    scale = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / scale if scale else float(not a.any() and not b.any())
