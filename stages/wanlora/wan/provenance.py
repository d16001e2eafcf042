"""Everything that decides a stored value, as fields; their fingerprint names the rows of a store.

Owns: the provenance of each kind of row, the one that release 0.1.0 recorded, and
the refusal of settings from outside that it would miss. Must not be imported by training.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from wanlora.core.fingerprint import canonical_json
from wanlora.errors import ConfigError, ModelError
from wanlora.wan import encoders, identity
from wanlora.wan.identity import RECIPE, Memo
from wanlora.wan.image_encoders import CONDITION_REVISION, IMAGE_DTYPE, processor_settings
from wanlora.wan.weights import HashFile, read_json, weights_sha256

_OVERRIDES = {
    "cuda": ("NVIDIA_TF32_OVERRIDE",),
    "cpu": ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
}
"""Environment variables that change the arithmetic below PyTorch. Sources: NVIDIA's cuBLAS and
oneDNN's documentation. TORCH_ALLOW_TF32_CUBLAS_OVERRIDE sets a default that the loaders replace."""


def vae_provenance(
    folder: Path,
    *,
    dtype: torch.dtype,
    tf32: bool,
    store_dtype: str,
    transform_revision: int,
    mantissa_bits: int | None = None,
    memo: Memo,
) -> dict[str, Any]:
    """Describe everything that determines the value of a latent.

    Args:
        folder: Model folder that holds `vae/`.
        dtype: Compute type of the VAE.
        tf32: True if TF32 convolutions were allowed (only applies to fp32).
        store_dtype: Type of the stored latents, for example float16.
        transform_revision: `clip.TRANSFORM_REVISION`: the pixel rules.
        mantissa_bits: Mantissa bits of the stored latents; None = not rounded.
        memo: Digests from before; new ones are added.

    Raises:
        ModelError: The VAE's files are missing or damaged.
    """
    config = dict(AutoencoderKLWan.load_config(folder / "vae", local_files_only=True))
    return {
        "kind": "latents",
        "recipe": RECIPE,
        "vae_tensors_sha256": identity.vae_sha256(folder, dtype, memo),
        "z_dim": config["z_dim"],
        "latents_mean": list(config["latents_mean"]),
        "latents_std": list(config["latents_std"]),
        "posterior": "mode",
        "normalized": True,
        "tiling": False,
        "compute_dtype": _dtype_name(dtype),
        "tf32": tf32 and dtype == torch.float32,
        "store_dtype": store_dtype,
        "mantissa_bits": mantissa_bits,
        "transform_revision": transform_revision,
    }


def text_provenance(
    folder: Path, *, dtype: torch.dtype, store_dtype: str, memo: Memo
) -> dict[str, Any]:
    """Describe everything that decides a prompt embedding's value, like `vae_provenance`.

    Raises:
        ModelError: Files of the text encoder or the tokenizer are missing or damaged.
    """
    config = read_json(folder / "text_encoder" / "config.json")
    return {
        "kind": "text",
        "recipe": RECIPE,
        "text_encoder_tensors_sha256": identity.text_encoder_sha256(folder, dtype, memo),
        "tokenizer_ids_sha256": identity.tokenizer_sha256(
            folder, lambda: encoders.load_tokenizer(folder), encoders.tokenize, memo
        ),
        "text_dim": config["d_model"],
        "max_sequence_length": encoders.MAX_SEQUENCE_LENGTH,
        "cleaning_revision": encoders.CLEANING_REVISION,
        "compute_dtype": _dtype_name(dtype),
        "store_dtype": store_dtype,
    }


def condition_provenance(vae: Mapping[str, Any]) -> dict[str, Any]:
    """Describe everything that decides the value of a condition: the VAE, and the recipe.

    Args:
        vae: From `vae_provenance`.
    """
    return {**vae, "kind": "cond_latents", "condition_revision": CONDITION_REVISION}


def clip_vision_provenance(
    folder: Path, *, store_dtype: str, transform_revision: int, memo: Memo
) -> dict[str, Any]:
    """Describe everything that decides the value of CLIP's embedding of a first frame.

    Args:
        folder: Model folder that holds `image_encoder/` and `image_processor/`.
        store_dtype: Type of the stored embeddings.
        transform_revision: `clip.TRANSFORM_REVISION`: the pixel rules.
        memo: Digests from before; new ones are added.

    Raises:
        ModelError: Files of the image encoder or its preprocessing are missing or damaged.
    """
    config = read_json(folder / "image_encoder" / "config.json")
    digest = identity.image_encoder_sha256(
        folder, int(config["num_hidden_layers"]), IMAGE_DTYPE, memo
    )
    return {
        "kind": "clip_vision",
        "recipe": RECIPE,
        "image_encoder_tensors_sha256": digest,
        "image_processor": processor_settings(folder),
        "num_tokens": 1 + (int(config["image_size"]) // int(config["patch_size"])) ** 2,
        "image_dim": config["hidden_size"],
        "layer": -2,
        "compute_dtype": _dtype_name(IMAGE_DTYPE),
        "store_dtype": store_dtype,
        "transform_revision": transform_revision,
    }


def recorded_by_0_1_0(
    folder: Path,
    provenance: Mapping[str, Any],
    stored: Iterable[Mapping[str, Any]],
    hash_file: HashFile,
) -> Mapping[str, Any] | None:
    """Find the provenance that release 0.1.0 recorded for the same encoder, which hashed files.

    Reads the files only if the other fields of a stored provenance are equal.

    Args:
        folder: Model folder.
        provenance: The encoder's, from `vae_provenance` or `text_provenance`.
        stored: Provenances of a cache.
        hash_file: Hex sha256 of a file.

    Returns:
        The stored provenance, or None if none is of this folder's files.
    """
    new = {name for name in provenance if name == "recipe" or name.endswith("_sha256")}
    common = {name: value for name, value in provenance.items() if name not in new}
    for candidate in stored:
        hashes = {name: value for name, value in candidate.items() if name.endswith("_sha256")}
        others = {name: value for name, value in candidate.items() if name not in hashes}
        if canonical_json(others) == canonical_json(common) and hashes == _file_hashes(
            folder, provenance["kind"], hash_file
        ):
            return candidate
    return None


def _file_hashes(folder: Path, kind: str, hash_file: HashFile) -> dict[str, str]:
    """Hashes as release 0.1.0 recorded them; empty if its record does not cover the folder."""
    if kind == "latents":
        return {"vae_sha256": weights_sha256(folder / "vae", hash_file)}
    if not identity.is_plain(folder, lambda: encoders.load_tokenizer(folder), encoders.tokenize):
        return {}
    return {
        "text_encoder_sha256": weights_sha256(folder / "text_encoder", hash_file),
        "tokenizer_sha256": hash_file(_tokenizer_file(folder / "tokenizer")),
    }


def require_own_arithmetic(device: torch.device) -> None:
    """Refuse environment variables that change values without a trace in the provenance.

    Raises:
        ConfigError: Names the variable and its value.
    """
    for name in _OVERRIDES.get(device.type, ()):
        if (value := os.environ.get(name)) not in (None, "", "STRICT", "strict"):
            raise ConfigError(
                f"{name}={value} changes the arithmetic of the encoders, which the cache would not "
                f"record: unset {name}; to change TF32, use --set tf32=true or tf32=false"
            )


def _tokenizer_file(part: Path) -> Path:
    """File that decides the tokens; tokenizer.json is read before spiece.model."""
    for name in ("tokenizer.json", "spiece.model"):
        if (part / name).is_file():
            return part / name
    raise ModelError(f"{part} holds neither tokenizer.json nor spiece.model")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
