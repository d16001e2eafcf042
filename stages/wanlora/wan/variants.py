"""Table of the supported Wan models.

Owns: one row per variant, and the row of a model's folder. Must not know: torch or diffusers;
training reads the table before it loads anything.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from wanlora.core.buckets import DEFAULT_FPS, TEMPORAL_FACTOR, Bucket
from wanlora.core.kinds import Kind
from wanlora.cost.flops import TransformerShape
from wanlora.errors import ConfigError, ModelError
from wanlora.wan import model_configs

Expert = Literal["high", "low"]
"""The transformer for high noise levels, or the one for low noise levels, of a model with two."""

# wan_shared_cfg.sample_neg_prompt of the original Wan2.1 code.
_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

# i2v_14B.sample_neg_prompt of the same code adds "camera shake".
_NEGATIVE_PROMPT_I2V = f"镜头晃动，{_NEGATIVE_PROMPT}"

# diffusers' AutoencoderKLWan defaults, equal to the constants of Wan2.1's wan/modules/vae.py.
_WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

# Measured over the clips that the micro model's DiT was pretrained on; `make micro` measures again.
_MICRO_MEAN = (
    -0.0375, -0.0132, -0.0059, 0.0079, -0.038, 0.0226, 0.0042, 0.0424,
    0.0159, 0.052, -0.0234, -0.0152, 0.0236, 0.005, -0.0006, 0.0019,
)  # fmt: skip
_MICRO_STD = (
    0.766, 1.1032, 0.4772, 0.2146, 0.3865, 0.581, 0.4133, 1.0516,
    0.5592, 0.6594, 0.605, 1.1646, 0.3922, 1.2492, 0.3531, 0.3642,
)  # fmt: skip


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


_WAN_VAE = VaePart(
    z_dim=16, latents_mean=_WAN_MEAN, latents_std=_WAN_STD, min_psnr_db=25.0,
    channel_std_range=(0.3, 3.0),
)  # fmt: skip
_MICRO_VAE = VaePart(
    z_dim=16, latents_mean=_MICRO_MEAN, latents_std=_MICRO_STD, min_psnr_db=None,
    channel_std_range=None,
)  # fmt: skip

_SHAPE_1_3B = TransformerShape(
    num_layers=30, num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, text_dim=4096
)
_SHAPE_14B = TransformerShape(
    num_layers=40, num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, text_dim=4096
)
_SHAPE_I2V = replace(_SHAPE_14B, in_channels=36)
_SHAPE_MICRO = TransformerShape(
    num_layers=5, num_attention_heads=4, attention_head_dim=32, ffn_dim=384, text_dim=64
)
_SHAPE_MICRO_I2V = replace(_SHAPE_MICRO, in_channels=36)

_WAN_2_1 = Defaults(
    num_frames=81, height=480, width=832, steps=50, shift=3.0, shift_720p=5.0,
    negative_prompt=_NEGATIVE_PROMPT,
)  # fmt: skip
_WAN_2_2 = Defaults(
    num_frames=81, height=480, width=832, steps=40, shift=12.0, shift_720p=12.0,
    negative_prompt=_NEGATIVE_PROMPT,
)  # fmt: skip
_WAN_2_1_I2V = replace(_WAN_2_1, steps=40, negative_prompt=_NEGATIVE_PROMPT_I2V)
_WAN_2_2_I2V = replace(_WAN_2_2, shift=5.0, shift_720p=5.0)
_MICRO = Defaults(
    num_frames=17, height=64, width=64, steps=20, shift=3.0, shift_720p=3.0, negative_prompt=""
)


def _one(*, guidance_scale: float, max_base_loss: float | None) -> tuple[TransformerPart, ...]:
    """The only transformer of a model, for all noise levels."""
    return (TransformerPart(None, "transformer", (0.0, 1.0), guidance_scale, max_base_loss),)


def _two(
    boundary: float,
    *,
    guidance_scale: tuple[float, float],
    max_base_loss: tuple[float | None, float | None],
) -> tuple[TransformerPart, ...]:
    """High-noise and low-noise expert, with the values of each in this order.

    Near sigma 1 the noise can be seen and the clip cannot. A perfect model then predicts
    noise - E[latents | prompt]: its loss is the variance of the latents given the prompt, up to
    P / (1 + P) of the target's power, if P is the mean square of the clip's latents. That is 0.5
    for the P = 1 of normalised latents and 0.75 for P = 3. A model that predicts zero has 1. So
    the limit of a high-noise expert is between the two, at 0.9. Not measured on the released
    weights. A low-noise expert leaves out the highest noise levels: the limit of Wan2.1, whose
    range includes them, is enough for it.
    """
    high, low = zip(guidance_scale, max_base_loss, strict=True)
    return (
        TransformerPart("high", "transformer", (boundary, 1.0), *high),
        TransformerPart("low", "transformer_2", (0.0, boundary), *low),
    )


# Recipe: configurations of the released models. The micro models have no thresholds: they are
# trained on drawn videos only, and users should be able to try all commands on real videos.
VARIANTS: dict[str, Variant] = {
    "t2v-1.3b": Variant(
        "t2v-1.3b", _one(guidance_scale=5.0, max_base_loss=0.5), _SHAPE_1_3B, _WAN_VAE, _WAN_2_1
    ),
    "t2v-14b": Variant(
        "t2v-14b", _one(guidance_scale=5.0, max_base_loss=0.5), _SHAPE_14B, _WAN_VAE, _WAN_2_1
    ),
    "t2v-a14b": Variant(
        "t2v-a14b", _two(0.875, guidance_scale=(4.0, 3.0), max_base_loss=(0.9, 0.5)),
        _SHAPE_14B, _WAN_VAE, _WAN_2_2,
    ),
    "i2v-14b": Variant(
        "i2v-14b", _one(guidance_scale=5.0, max_base_loss=0.5),
        replace(_SHAPE_I2V, image_dim=1280), _WAN_VAE, _WAN_2_1_I2V,
    ),
    "i2v-a14b": Variant(
        "i2v-a14b", _two(0.9, guidance_scale=(3.5, 3.5), max_base_loss=(0.9, 0.5)),
        _SHAPE_I2V, _WAN_VAE, _WAN_2_2_I2V,
    ),
    "micro": Variant(
        "micro", _one(guidance_scale=3.0, max_base_loss=None), _SHAPE_MICRO, _MICRO_VAE, _MICRO,
        is_micro=True,
    ),
    "micro-a14b": Variant(
        "micro-a14b", _two(0.875, guidance_scale=(3.0, 3.0), max_base_loss=(None, None)),
        _SHAPE_MICRO, _MICRO_VAE, _MICRO, is_micro=True,
    ),
    "micro-i2v": Variant(
        "micro-i2v", _one(guidance_scale=3.0, max_base_loss=None), _SHAPE_MICRO_I2V, _MICRO_VAE,
        _MICRO, is_micro=True,
    ),
    "micro-i2v-clip": Variant(
        "micro-i2v-clip", _one(guidance_scale=3.0, max_base_loss=None),
        replace(_SHAPE_MICRO_I2V, image_dim=32), _MICRO_VAE, _MICRO, is_micro=True,
    ),
    "micro-i2v-a14b": Variant(
        "micro-i2v-a14b", _two(0.9, guidance_scale=(3.0, 3.0), max_base_loss=(None, None)),
        _SHAPE_MICRO_I2V, _MICRO_VAE, _MICRO, is_micro=True,
    ),
}  # fmt: skip


def variant_of(folder: Path, expert: Expert | None = None) -> Variant:
    """Find the row of a model's folder by the configurations in it.

    model_index.json decides whether the model has one transformer or two, and the transformer's
    configuration decides the rest. A folder with only the encoders is the first row that shares
    them (Wan's T2V models all do). Every configuration present must agree with the row.

    Args:
        folder: The model's folder.
        expert: The expert that the user named. Without model_index.json, a folder with only
            `transformer/` may be of a model with one transformer or the high-noise expert of one
            with two: it is the latter if an expert is named.

    Raises:
        ModelError: No row matches; names the model, or lists the fields that differ.
    """
    if name := model_configs.unsupported_model(folder):
        raise ModelError(
            f"the model in {folder} is {name}, which wanlora does not support yet; supported: "
            f"{', '.join(VARIANTS)}"
        )
    present = model_configs.read_fields(folder)
    if not present:
        raise ModelError(
            f"{folder} holds no transformer/config.json, vae/config.json or "
            "text_encoder/config.json; expected a folder in diffusers' layout"
        )
    rows = sorted(VARIANTS.values(), key=lambda row: (row.boundary is None) == bool(expert))
    for row in rows:
        if all(_expected(row)[key] == value for key, value in present.items()):
            return row
    different = {
        row.name: {
            key: _expected(row)[key] for key in present if _expected(row)[key] != present[key]
        }
        for row in VARIANTS.values()
    }
    keys = dict.fromkeys(key for fields in different.values() for key in fields)
    listed = "\n".join(f"  {name}: {_text(fields)}" for name, fields in different.items())
    raise ModelError(
        f"the model in {folder} does not match any supported variant\n  found: "
        f"{_text({key: present[key] for key in keys})}\n{listed}"
    )


def _expected(row: Variant) -> dict[str, Any]:
    """Values of the fields of `model_configs.read_fields` for a row."""
    shape, vae = row.shape, row.vae
    return model_configs.CONSTANTS | {
        "model_index.transformer_2": row.boundary is not None,
        "model_index.boundary_ratio": row.boundary,
        "model_index._class_name": "WanImageToVideoPipeline" if row.is_i2v else "WanPipeline",
        "transformer.num_layers": shape.num_layers,
        "transformer.num_attention_heads": shape.num_attention_heads,
        "transformer.attention_head_dim": shape.attention_head_dim,
        "transformer.ffn_dim": shape.ffn_dim,
        "transformer.text_dim": shape.text_dim,
        "transformer.in_channels": shape.in_channels,
        "transformer.out_channels": shape.out_channels,
        "transformer.image_dim": shape.image_dim,
        "transformer.added_kv_proj_dim": shape.width if shape.image_dim else None,
        "vae.z_dim": vae.z_dim,
        "vae.latents_mean": vae.latents_mean,
        "vae.latents_std": vae.latents_std,
        "text_encoder.d_model": shape.text_dim,
        "image_encoder.hidden_size": shape.image_dim,
    }


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}={f'({value[0]}, ...)' if isinstance(value, tuple) and len(value) > 3 else value}"
        for key, value in values.items()
    )
