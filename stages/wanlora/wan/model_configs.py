"""Configurations in a model's folder: what identifies its variant, and models with another name.

Owns: reading them, and the names of unsupported Wan models. Must not know: the table of variants,
torch or diffusers.
"""

from pathlib import Path
from typing import Any

from wanlora.errors import ModelError
from wanlora.wan.model_folder import IMAGE_ENCODER, INDEX, PIPELINE, SECOND, has_second
from wanlora.wan.weights import read_json

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
_IMAGE_ENCODER: dict[str, Any] = {
    "model_type": "clip_vision_model", "hidden_act": "gelu", "layer_norm_eps": 1e-5,
    "num_channels": 3,
}  # fmt: skip
_NEVER = ("quantization_config", "transformers_weights", "per_layer_config")
"""Fields that make from_pretrained load other than the folder's unchanged weights."""

CONSTANTS: dict[str, Any] = {
    **{f"{part}.{name}": None for part in (*PIPELINE, *IMAGE_ENCODER) for name in _NEVER},
    **{f"vae.{name}": value for name, value in _VAE.items()},
    **{f"text_encoder.{name}": value for name, value in _TEXT_ENCODER.items()},
    **{f"image_encoder.{name}": value for name, value in _IMAGE_ENCODER.items()},
}
"""Values of fields that all supported models share, by `part.field`."""

_FIELDS = {
    "transformer": ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim",
                    "text_dim", "in_channels", "out_channels", "image_dim", "added_kv_proj_dim"),
    "vae": ("z_dim", "latents_mean", "latents_std", *_VAE),
    "text_encoder": ("d_model", *_TEXT_ENCODER),
    "image_encoder": ("hidden_size", *_IMAGE_ENCODER),
}  # fmt: skip

_NONE_COUNTS = ("image_dim", "added_kv_proj_dim")
"""Fields of the transformer that identify a variant also if they are not set."""

_CLASSES = {
    "transformer": ("WanTransformer3DModel",),
    "model_index": ("WanPipeline", "WanImageToVideoPipeline"),
}
"""Class names of the supported models."""

_NAMES = {
    "WanVACE": "Wan-VACE",
    "WanAnimate": "Wan2.2-Animate",
    "WanSpeechToVideo": "Wan2.2-S2V",
    "SkyReelsV2": "SkyReels-V2",
    "ChronoEdit": "ChronoEdit",
}
"""Names of unsupported models, by the beginning of their class names in diffusers."""

_NAMES_BY_CHANNELS = {
    (48, 16): "a control model, such as Wan-Fun-Control",
    (48, 48): "Wan2.2-TI2V-5B",
}
"""Names of unsupported models with the class of Wan's other models, by in_channels, out_channels.
"""

_FUN = {"in_channels": 36, "num_layers": 30}
"""Transformer of the small Wan-Fun-InP: Wan has no image-to-video model of 1.3B."""


def unsupported_model(folder: Path) -> str | None:
    """Name an unsupported model with the evidence; None if nothing shows that it is one."""
    for part in ("model_index", "transformer", SECOND):
        config = _read(folder, part)
        file = _file(folder, part).relative_to(folder)
        found, expected = config.get("_class_name"), _CLASSES[part.removesuffix("_2")]
        if found not in (None, *expected):
            names = (name for start, name in _NAMES.items() if str(found).startswith(start))
            return f"{next(names, 'of another kind')} ({file}: _class_name {found})"
        channels = config.get("in_channels"), config.get("out_channels")
        if channels in _NAMES_BY_CHANNELS:
            name = _NAMES_BY_CHANNELS[channels]
            return f"{name} ({file}: in_channels={channels[0]}, out_channels={channels[1]})"
        if (tokens := config.get("pos_embed_seq_len")) is not None:
            return f"Wan2.1-FLF2V (first and last frame; {file}: pos_embed_seq_len={tokens})"
        if all(config.get(field) == value for field, value in _FUN.items()):
            return f"Wan-Fun-InP 1.3B ({file}: in_channels=36, num_layers=30)"
    return None


def read_fields(folder: Path) -> dict[str, Any]:
    """Collect what identifies a variant, by `part.field`; a field that is not set is absent.

    Raises:
        ModelError: A configuration is not that of its part, or the two transformers differ.
    """
    fields: dict[str, Any] = {}
    for part, names in _FIELDS.items():
        fields |= {f"{part}.{name}": value for name, value in _read_part(folder, part, names)}
    second = {
        f"transformer.{name}": value
        for name, value in _read_part(folder, SECOND, _FIELDS["transformer"])
    }
    first = {key: value for key, value in fields.items() if key.startswith("transformer.")}
    if first and second and first != second:
        keys = sorted(key for key in first | second if first.get(key) != second.get(key))
        different = (f"{key}={first.get(key)} and {second.get(key)}" for key in keys)
        raise ModelError(
            f"the two transformers in {folder} differ: {', '.join(different)}; expected "
            "transformer/ and transformer_2/ of one model"
        )
    fields |= second
    return fields | _read_index(folder) if fields else {}


def _read_index(folder: Path) -> dict[str, Any]:
    """Number of transformers and their boundary; without model_index.json only what is certain."""
    second = has_second(folder)
    if not (folder / INDEX).is_file():
        return {"model_index.transformer_2": True} if second else {}
    index = _read(folder, "model_index")
    fields = {
        "model_index.transformer_2": second,
        "model_index.boundary_ratio": index.get("boundary_ratio"),
    }
    found = index.get("_class_name")
    return fields | ({"model_index._class_name": found} if found else {})


def _read_part(folder: Path, part: str, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    """Fields of a part's configuration that are set; none if the folder lacks the part."""
    config = _read(folder, part)
    fields = [
        (name, tuple(value) if isinstance(value, list) else value)
        for name in (*names, *_NEVER)
        if (value := config.get(name)) is not None
    ]
    if config and not fields:
        raise ModelError(f"{_file(folder, part)} is not the configuration of a Wan {part}")
    if fields:
        fields += [(name, None) for name in _NONE_COUNTS if name in names and not config.get(name)]
    return fields


def _read(folder: Path, part: str) -> dict[str, Any]:
    file = _file(folder, part)
    return read_json(file) if file.is_file() else {}


def _file(folder: Path, part: str) -> Path:
    return folder / INDEX if part == "model_index" else folder / part / "config.json"
