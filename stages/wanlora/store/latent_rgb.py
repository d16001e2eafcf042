"""A linear picture of latents: RGB ~ [latent, 1] @ W, fitted by least squares, no VAE needed.

Owns: the fit. Its normal equations are additive: every segment of a store has its own, and a
reader sums and solves them. Legend: C latent channels, F latent frames, H W latent size.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Float64, UInt8

RIDGE = 1e-6


def normal_equations(
    latents: Float[np.ndarray, "c f h w"], frames: UInt8[np.ndarray, "t hh ww 3"]
) -> tuple[Float64[np.ndarray, "c1 c1"], Float64[np.ndarray, "c1 3"]]:
    """Sum X^T X and X^T Y over latent pixels, X = [latent, 1], Y = RGB in [0, 1].

    A latent frame corresponds to frame 0 or to the mean of its 4 frames, a latent pixel to the mean
    of its 8 x 8 pixels.

    Args:
        latents: Normalised latents of one clip.
        frames: The clip's frames, 1 + 4 (f - 1) of them, 8 h x 8 w px.
    """
    channels, num_latent_frames, height, width = latents.shape
    assert frames.shape[0] == 1 + 4 * (num_latent_frames - 1), (latents.shape, frames.shape)
    assert frames.shape[1:3] == (8 * height, 8 * width), (latents.shape, frames.shape)
    small = frames.reshape(-1, height, 8, width, 8, 3).mean(axis=(2, 4), dtype=np.float32) / 255.0
    later = small[1:].reshape(-1, 4, height, width, 3).mean(axis=1)
    y = np.concatenate([small[:1], later]).reshape(-1, 3).astype(np.float64)
    x = np.ones((y.shape[0], channels + 1))
    x[:, :channels] = np.moveaxis(latents, 0, -1).reshape(-1, channels)
    return x.T @ x, x.T @ y


def solve(
    gram: Float64[np.ndarray, "c1 c1"], cross: Float64[np.ndarray, "c1 3"]
) -> Float64[np.ndarray, "c1 3"]:
    """Projection W from summed normal equations, with a ridge too small to be visible."""
    scale = max(float(np.trace(gram)) / gram.shape[0], 1e-12)
    ridge = RIDGE * scale * np.eye(gram.shape[0])
    projection: np.ndarray[Any, np.dtype[np.float64]] = np.linalg.solve(gram + ridge, cross)
    return projection


def to_rgb(
    latents: Float[np.ndarray, "c f h w"], projection: Float64[np.ndarray, "c1 3"]
) -> UInt8[np.ndarray, "f h w 3"]:
    """Approximate small picture of each latent frame."""
    rgb = np.moveaxis(latents, 0, -1).astype(np.float64) @ projection[:-1] + projection[-1]
    picture: np.ndarray[Any, np.dtype[np.uint8]] = np.rint(255 * rgb).clip(0, 255).astype(np.uint8)
    return picture
