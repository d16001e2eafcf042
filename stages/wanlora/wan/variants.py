"""Table of the supported Wan models.

Owns: one row per variant, and the row of a model's folder by its configurations. Must not know:
torch or diffusers; training reads the table before it loads anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanlora.core.buckets import DEFAULT_FPS
from wanlora.cost.flops import TransformerShape
from wanlora.errors import ModelError
from wanlora.wan.model_folder import PIPELINE
from wanlora.wan.weights import read_json

# wan_shared_cfg.sample_neg_prompt of the original Wan2.1 code.
_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

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
class Variant:
    """One row of the table: architecture, sampling defaults and limits for plausible weights.

    Attributes:
        latents_mean: Per-channel mean of the raw latents; latents = (raw - mean) / std.
        shift: Shift of sigma in training and sampling at the default size.
        min_psnr_db: Minimum PSNR of decode(encode(frames)); None = not checked.
        channel_std_range: Allowed range of each latent channel's standard deviation; None = not
            checked.
        max_base_loss: Maximum loss of the base on real pairs, as a fraction of the velocity
            target's power; None = not checked.
        fps: Frames per second of the videos that the model was trained on.
    """

    name: str
    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    text_dim: int
    z_dim: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    shift: float
    num_frames: int
    height: int
    width: int
    steps: int
    guidance_scale: float
    negative_prompt: str
    min_psnr_db: float | None
    channel_std_range: tuple[float, float] | None
    max_base_loss: float | None
    max_sequence_length: int = 512
    fps: float = DEFAULT_FPS

    @property
    def transformer_shape(self) -> TransformerShape:
        """Fields of the transformer that determine its FLOPs and bytes."""
        return TransformerShape(
            num_layers=self.num_layers,
            num_attention_heads=self.num_attention_heads,
            attention_head_dim=self.attention_head_dim,
            ffn_dim=self.ffn_dim,
            text_dim=self.text_dim,
            in_channels=self.z_dim,
            num_text_tokens=self.max_sequence_length,
        )


# Fields that change the output of the encoders but not the shape of any weight. Source:
# configurations of Wan-AI's diffusers repositories; the micro model has the same. Other fields
# change shapes or names of weights, and loading refuses those.
_VAE: dict[str, Any] = {
    "is_residual": False, "patch_size": None, "temperal_downsample": (False, True, True),
    "attn_scales": (), "in_channels": 3, "out_channels": 3,
}  # fmt: skip
_TEXT_ENCODER: dict[str, Any] = {
    "model_type": "umt5", "is_decoder": False, "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new", "is_gated_act": True, "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
}  # fmt: skip
_NEVER = ("quantization_config", "transformers_weights", "per_layer_config")
"""Fields that make from_pretrained load other than the folder's unchanged weights."""

# Recipe: configurations of the released models. The micro model has no thresholds: it
# is trained on drawn videos only, and users should be able to try all commands on real videos.
VARIANTS: dict[str, Variant] = {
    "t2v-1.3b": Variant(
        name="t2v-1.3b", num_layers=30, num_attention_heads=12, attention_head_dim=128,
        ffn_dim=8960, text_dim=4096, z_dim=16, latents_mean=_WAN_MEAN, latents_std=_WAN_STD,
        shift=3.0, num_frames=81, height=480, width=832, steps=50, guidance_scale=5.0,
        negative_prompt=_NEGATIVE_PROMPT, min_psnr_db=25.0, channel_std_range=(0.3, 3.0),
        max_base_loss=0.5,
    ),
    "t2v-14b": Variant(
        name="t2v-14b", num_layers=40, num_attention_heads=40, attention_head_dim=128,
        ffn_dim=13824, text_dim=4096, z_dim=16, latents_mean=_WAN_MEAN, latents_std=_WAN_STD,
        shift=3.0, num_frames=81, height=480, width=832, steps=50, guidance_scale=5.0,
        negative_prompt=_NEGATIVE_PROMPT, min_psnr_db=25.0, channel_std_range=(0.3, 3.0),
        max_base_loss=0.5,
    ),
    "micro": Variant(
        name="micro", num_layers=5, num_attention_heads=4, attention_head_dim=32,
        ffn_dim=384, text_dim=64, z_dim=16, latents_mean=_MICRO_MEAN, latents_std=_MICRO_STD,
        shift=3.0, num_frames=17, height=64, width=64, steps=20, guidance_scale=3.0,
        negative_prompt="", min_psnr_db=None, channel_std_range=None, max_base_loss=None,
    ),
}  # fmt: skip


def variant_of(folder: Path) -> Variant:
    """Find the row of a model's folder by the configurations in it.

    The transformer decides; a folder with only the encoders is the first row that shares them
    (Wan's T2V models all do). Every configuration present must agree with the row.

    Raises:
        ModelError: No row matches; lists the fields that differ. Or it has two transformers.
    """
    _require_one_transformer(folder)
    present = _read_fields(folder)
    if not present:
        raise ModelError(
            f"{folder} holds no transformer/config.json, vae/config.json or "
            "text_encoder/config.json; expected a folder in diffusers' layout"
        )
    for row in VARIANTS.values():
        if all(_expected(row)[key] == value for key, value in present.items()):
            return row
    different = {
        row.name: {
            key: _expected(row)[key] for key in present if _expected(row)[key] != present[key]
        }
        for row in VARIANTS.values()
    }
    keys = dict.fromkeys(key for fields in different.values() for key in fields)
    rows = "\n".join(f"  {name}: {_text(fields)}" for name, fields in different.items())
    raise ModelError(
        f"the model in {folder} does not match any supported variant\n  found: "
        f"{_text({key: present[key] for key in keys})}\n{rows}"
    )


def _require_one_transformer(folder: Path) -> None:
    """Refuse a Wan2.2 pair: each model has the shape of Wan2.1's 14B, but is only for some sigmas.

    Raises:
        ModelError: Names the file that shows it.
    """
    index = folder / "model_index.json"
    names = ("transformer_2", "boundary_ratio")
    values = read_json(index) if index.is_file() else {}
    second = {k: values[k] for k in names if values.get(k) not in (None, [None, None])}
    if second:
        raise ModelError(
            f"the model in {folder} has two transformers, as Wan2.2's A14B does (model_index.json: "
            f"{_text(second)}); expected Wan2.1's T2V models, which have one"
        )


def _read_fields(folder: Path) -> dict[str, Any]:
    """Collect what identifies a variant from the configurations in a folder."""
    fields: dict[str, Any] = {}
    names_by_part = {
        "transformer": ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim",
                        "text_dim", "in_channels", "out_channels"),
        "vae": ("z_dim", "latents_mean", "latents_std", *_VAE),
        "text_encoder": ("d_model", *_TEXT_ENCODER),
    }  # fmt: skip
    for part, names in names_by_part.items():
        file = folder / part / "config.json"
        if not file.is_file():
            continue
        config = read_json(file)
        fields |= {
            f"{part}.{name}": tuple(value) if isinstance(value, list) else value
            for name in (*names, *_NEVER)
            if (value := config.get(name)) is not None
        }
        if not any(key.startswith(f"{part}.") for key in fields):
            raise ModelError(f"{file} is not the configuration of a Wan {part}")
    return fields


def _expected(row: Variant) -> dict[str, Any]:
    constants = {f"vae.{name}": value for name, value in _VAE.items()}
    constants |= {f"text_encoder.{name}": value for name, value in _TEXT_ENCODER.items()}
    never = {f"{part}.{name}": None for part in PIPELINE for name in _NEVER}
    return (
        constants
        | never
        | {
            "transformer.num_layers": row.num_layers,
            "transformer.num_attention_heads": row.num_attention_heads,
            "transformer.attention_head_dim": row.attention_head_dim,
            "transformer.ffn_dim": row.ffn_dim,
            "transformer.text_dim": row.text_dim,
            "transformer.in_channels": row.z_dim,
            "transformer.out_channels": row.z_dim,
            "vae.z_dim": row.z_dim,
            "vae.latents_mean": row.latents_mean,
            "vae.latents_std": row.latents_std,
            "text_encoder.d_model": row.text_dim,
        }
    )


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}={f'({value[0]}, ...)' if isinstance(value, tuple) and len(value) > 3 else value}"
        for key, value in values.items()
    )
