"""Table of the supported Wan models.

Owns: one row per variant, and the row of a model's folder. Must not know: torch or diffusers;
training reads the table before it loads anything.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from wanlora.cost.flops import TransformerShape
from wanlora.errors import ModelError
from wanlora.wan import model_configs
from wanlora.wan.variant import (
    Defaults,
    Expert,
    TransformerPart,
    VaePart,
    Variant,
    describe_range,
)

__all__ = ["VARIANTS", "Expert", "TransformerPart", "Variant", "describe_range", "variant_of"]

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
