"""Adapter files of other tools: the settings each can express, the place of the scale, its header.

Owns: one row per format. Does not write files and does not read them back (see `reread`).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from wanlora.adapters.alphas import PEFT_CONFIG, plain_number
from wanlora.adapters.file import AdapterFile, diffusers_header, to_bytes
from wanlora.adapters.header import PROVENANCE_PREFIX, RANGE_KEY, sigmas_of, timestep_range
from wanlora.adapters.names import BLOCK_LINEARS, IMAGE_LINEARS, LAYOUTS, template
from wanlora.adapters.updates import PREFIX, Update, folded
from wanlora.core import units
from wanlora.errors import AdapterError

PEFT_FILE = "adapter_model.safetensors"

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# Settings that a loader needs; it does not use the other settings of another trainer.
_SETTINGS = (
    "r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
)  # fmt: skip

Updates = Mapping[str, Update]


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative error of an update: A, B and a scale, each rounded once by eps / 2."""
    return 2 * torch.finfo(dtype).eps


@dataclass(frozen=True, slots=True)
class Format:
    """Limits and conventions of another tool's file.

    Attributes:
        scale: Place of the scale: the settings beside the tensors, an alpha per module, or none, so
            that B is multiplied with it.
        refuse: Returns the reason if an adapter cannot be written in this format, otherwise None.
        header: Safetensors header that other tools of the format write.
    """

    scale: Literal["settings", "alpha", "folded"]
    refuse: Callable[[Updates], str | None]
    header: Callable[[AdapterFile, Updates, str], dict[str, str]]


def encode(
    adapter: AdapterFile,
    form: str,
    dtype: torch.dtype,
    *,
    title: str,
    provenance: Mapping[str, str],
) -> dict[str, bytes]:
    """Write an adapter in another format; equal input gives equal bytes.

    Args:
        adapter: From `read_adapter`.
        form: A row of `FORMATS`.
        dtype: Type of the matrices.
        title: Title in model managers.
        provenance: Values to record, in keys with the `wanlora.` prefix.

    Returns:
        Bytes by file name: one `.safetensors`, and PEFT's settings beside it.

    Raises:
        AdapterError: The format cannot express it.
    """
    row, updates = FORMATS[form], adapter.updates()
    if reason := row.refuse(updates):
        raise AdapterError(f"{adapter.path} cannot be written for {form}: {reason}")
    tensors: dict[str, Tensor] = {}
    for module, update in updates.items():
        tensors |= _tensors(module, update, form, dtype)
    header = row.header(adapter, updates, title) | {
        f"{PROVENANCE_PREFIX}{key}": value for key, value in provenance.items()
    }
    files = {PEFT_FILE: to_bytes(tensors, header)}
    if form == "peft":
        files[PEFT_CONFIG] = _peft_config(adapter)
    return files


def _tensors(module: str, update: Update, form: str, dtype: torch.dtype) -> dict[str, Tensor]:
    layout, scale = LAYOUTS[form], FORMATS[form].scale
    name = layout.written(module)
    b = folded(update.b, update.scale) if scale == "folded" else update.b
    tensors = {
        f"{name}.{layout.matrices['A']}": update.a.to(dtype),
        f"{name}.{layout.matrices['B']}": b.to(dtype),
    }
    if update.magnitude is not None:
        tensors[f"{name}.lora_magnitude_vector"] = update.magnitude.to(dtype)
    if scale == "alpha":  # such that alpha / rank is the scale, with rsLoRA too
        tensors[f"{name}.alpha"] = torch.tensor(update.scale * update.rank, dtype=torch.float32)
    return tensors


def _settings(adapter: AdapterFile) -> dict[str, Any]:
    found = {key: adapter.metadata.get(f"{PREFIX}{key}") for key in _SETTINGS}
    if not adapter.provenance:  # another tool's pattern may match more than it has matrices for
        found["target_modules"] = sorted(adapter.updates())
    return {key: value for key, value in found.items() if value not in (None, False, {})}


def _peft_config(adapter: AdapterFile) -> bytes:
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.provenance.get("model"),
        "bias": "none",
        "inference_mode": True,
        **_settings(adapter),
    }
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _never(_: Updates) -> str | None:
    """Accept every adapter: the settings can express everything that peft can train."""
    return None


def _no_comfyui(updates: Updates) -> str | None:
    """Refuse DoRA: ComfyUI's weight_decompose divides by |W|, peft by |W + dW|, row by row."""
    if any(update.magnitude is not None for update in updates.values()):
        return (
            "it is a DoRA. ComfyUI divides its rows by the norm of W, but it was trained with the "
            "norm of W + dW, so the result would be wrong by several percent. --format merged is "
            "exact"
        )
    unknown = [module for module in updates if LAYOUTS["comfyui"].written(module) is None]
    if unknown:
        return f"the original Wan code has no name for {units.names(unknown)}"
    return None


def _no_kohya(updates: Updates) -> str | None:
    """Return a reason unless exactly all linear modules of the blocks 0 .. n-1 are adapted."""
    if reason := _no_comfyui(updates):
        return reason
    parts = [template(module) for module in updates]
    if outside := sorted(name for name, number in parts if not number):
        return (
            "diffusers reads kohya's modules inside blocks only, and this adapter has "
            f"{units.names(outside)}; {_COMFYUI}"
        )
    blocks = range(len({number for _, number in parts}))
    reads_image = any(name in IMAGE_LINEARS for name, _ in parts)
    linears = (*BLOCK_LINEARS, *(IMAGE_LINEARS if reads_image else ()))
    wanted = [name.replace("N", str(block), 1) for block in blocks for name in linears]
    if missing := [module for module in wanted if module not in updates]:
        return (
            f"diffusers reads kohya's files only if all {len(linears)} linear modules of every "
            f"block are adapted, and {units.names(missing)} are not; {_COMFYUI}"
        )
    return None


_COMFYUI = (
    "use --format comfyui, which has no such limit and which ComfyUI reads too; if another tool "
    "needs kohya's names, convert that file with musubi-tuner: python "
    "src/musubi_tuner/convert_lora.py --input IN --output OUT --target default"
)


# --- headers ---


def _diffusers_header(adapter: AdapterFile, _: Updates, __: str) -> dict[str, str]:
    return diffusers_header({f"{PREFIX}{key}": item for key, item in _settings(adapter).items()})


def _no_header(_: AdapterFile, __: Updates, ___: str) -> dict[str, str]:
    return {}


def _ecosystem_header(adapter: AdapterFile, updates: Updates, title: str) -> dict[str, str]:
    """Fields of ModelSpec and kohya's that ComfyUI and model managers show.

    Values as musubi-tuner writes them. No date: an equal adapter gives an equal file.
    """
    provenance = adapter.provenance
    header = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "wan2.1/lora",
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.1",
        "modelspec.title": title,
        "ss_base_model_version": "wan",
    }
    ranks = {update.rank for update in updates.values()}
    if len(ranks) == 1:
        header["ss_network_dim"] = str(ranks.pop())
    if sigmas := sigmas_of(adapter.expert, provenance.get("variant")):
        header[RANGE_KEY] = timestep_range(sigmas)
    known = {"ss_sd_model_name": "model", "ss_steps": "step", "ss_seed": "seed"}
    return header | {field: provenance[name] for field, name in known.items() if name in provenance}


def _comfyui_header(adapter: AdapterFile, updates: Updates, title: str) -> dict[str, str]:
    header = _ecosystem_header(adapter, updates, title)
    dim = header.get("ss_network_dim")  # the scale is in B: alpha is the rank
    return header | ({"ss_network_alpha": dim} if dim else {})


def _kohya_header(adapter: AdapterFile, updates: Updates, title: str) -> dict[str, str]:
    header = _ecosystem_header(adapter, updates, title) | {"ss_network_module": "networks.lora_wan"}
    alphas = {update.scale * update.rank for update in updates.values()}
    return header | ({"ss_network_alpha": str(plain_number(*alphas))} if len(alphas) == 1 else {})


FORMATS: dict[str, Format] = {
    "diffusers": Format("settings", _never, _diffusers_header),
    "peft": Format("settings", _never, _no_header),
    "comfyui": Format("folded", _no_comfyui, _comfyui_header),
    "kohya": Format("alpha", _no_kohya, _kohya_header),
}
