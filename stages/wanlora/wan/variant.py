"""A Wan model as training and sampling see it: its transformers, its VAE, its defaults.

Owns: the fields of a row of the table of variants (`variants`), and what follows from them. Must
not know: torch, diffusers or files.
"""

import math
from dataclasses import dataclass
from typing import Literal

from wanlora.core.buckets import DEFAULT_FPS, TEMPORAL_FACTOR, Bucket
from wanlora.core.kinds import Kind
from wanlora.cost.flops import TransformerShape
from wanlora.errors import ConfigError, ModelError

Expert = Literal["high", "low"]
"""The transformer for high noise levels, or the one for low noise levels, of a model with two."""


@dataclass(frozen=True, slots=True)
class TransformerPart:
    """One transformer of a model, and the noise levels that it is for.

    Attributes:
        expert: None if the model has one transformer.
        subfolder: Sub-folder of the model's folder with its weights.
        sigmas: Range of sigma, in [0, 1]. A lower bound above 0 is included, an upper bound below
            1 is not: at the boundary of two experts, diffusers runs the high-noise expert.
        guidance_scale: Default of sampling in this range.
        max_base_loss: Maximum loss of the base on real pairs of this range, as a fraction of the
            velocity target's power; None = not checked.
    """

    expert: Expert | None
    subfolder: str
    sigmas: tuple[float, float]
    guidance_scale: float
    max_base_loss: float | None


@dataclass(frozen=True, slots=True)
class VaePart:
    """The VAE of a model, and limits for plausible weights.

    Attributes:
        latents_mean: Per-channel mean of the raw latents; latents = (raw - mean) / std.
        min_psnr_db: Minimum PSNR of decode(encode(frames)); None = not checked.
        channel_std_range: Allowed range of each latent channel's standard deviation; None = not
            checked.
    """

    z_dim: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    min_psnr_db: float | None
    channel_std_range: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Defaults:
    """Size of the videos that a model was trained on, and its sampling settings.

    Attributes:
        fps: Frames per second of the videos.
        shift: Shift of sigma at 480p, in training and sampling.
        shift_720p: Shift of sigma at 720p; see `Variant.shift_of`.
    """

    num_frames: int
    height: int
    width: int
    steps: int
    shift: float
    shift_720p: float
    negative_prompt: str
    fps: float = DEFAULT_FPS


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the table.

    Attributes:
        transformers: The transformers with their noise levels, highest noise first.
        shape: Shape of each of them; includes the width and the number of tokens of
            the text encoder's output.
        is_micro: Trained on drawn videos only, and small enough for a CPU.
    """

    name: str
    transformers: tuple[TransformerPart, ...]
    shape: TransformerShape
    vae: VaePart
    defaults: Defaults
    is_micro: bool = False

    @property
    def boundary(self) -> float | None:
        """Sigma at which the low-noise expert takes over; None with one transformer."""
        return self.transformers[0].sigmas[0] if len(self.transformers) > 1 else None

    @property
    def is_i2v(self) -> bool:
        """True for a model that animates an image: its input has the image's latents and a mask.

        The mask has a channel per frame of a latent frame.
        """
        return self.shape.in_channels == 2 * self.vae.z_dim + TEMPORAL_FACTOR

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kinds of encodings that a training of this model reads."""
        kinds: tuple[Kind, ...] = ("latents", "text")
        if self.is_i2v:
            kinds += ("cond_latents",)
        return (*kinds, "clip_vision") if self.shape.image_dim else kinds

    @property
    def image_shape(self) -> tuple[int, int] | None:
        """Tokens of an image's embeddings and their width; None if the transformer reads none."""
        shape = self.shape
        return (shape.num_image_tokens, shape.image_dim) if shape.image_dim else None

    def part(self, expert: Expert | None) -> TransformerPart:
        """Transformer of an expert, or the only one.

        Raises:
            ModelError: The model has two and `expert` is None, or it has one and `expert` is not.
        """
        for part in self.transformers:
            if part.expert == expert:
                return part
        if expert is None:
            choices = " or ".join(
                f"--expert {part.expert} ({describe_range(part.sigmas)})"
                for part in self.transformers
            )
            raise ModelError(f"{self.name} has two transformers: name one of them with {choices}")
        raise ModelError(
            f"{self.name} has one transformer, which is for all noise levels: leave out "
            f"--expert {expert}"
        )

    def guidance_scales(self, first: float | None, low: float | None) -> tuple[float, ...]:
        """Guidance of each transformer: as set, otherwise the variant's.

        Args:
            first: Guidance, if set; also of a low-noise expert that has none of its own.
            low: Guidance of the low-noise expert, if set.

        Raises:
            ConfigError: `low` is set, and the model has no low-noise expert.
        """
        if low is not None and self.boundary is None:
            raise ConfigError(
                f"{self.name} has one transformer: leave out --guidance-scale-low, which is for "
                "models with two"
            )
        given = (first, first if low is None else low)
        parts = zip(self.transformers, given, strict=False)
        return tuple(part.guidance_scale if scale is None else scale for part, scale in parts)

    def shift_of(self, size: Bucket) -> float:
        """Shift of sigma for a size: that of 480p or of 720p, whose area is nearer as a ratio.

        Source: Wan2.1 samples with a shift of 3 at 832x480 and 5 at 1280x720; Wan2.2's T2V-A14B
        has 12 for both and its I2V-A14B has 5.
        """
        between = math.sqrt(math.prod(_480P) * math.prod(_720P))  # 607,000 pixels
        larger = size.height * size.width > between
        return self.defaults.shift_720p if larger else self.defaults.shift


_480P, _720P = (480, 832), (720, 1280)


def describe_range(sigmas: tuple[float, float]) -> str:
    """Format a range of sigma, for example `sigma 0.875 to 1`."""
    return f"sigma {sigmas[0]:g} to {sigmas[1]:g}"
