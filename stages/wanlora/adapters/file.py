"""Contract 3, the adapter's file: ours in diffusers' layout, and other trainers' read into it.

Owns: `AdapterFile`, reading any trainer's plain LoRA into it, and writing ours, so that
`WanPipeline.load_lora_weights(folder)` reads what is written here.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from wanlora.adapters.alphas import (
    LORA_HEADER,
    PEFT_CONFIG,
    alpha_sources,
    check_ranks,
    completed,
    finite,
    plain_number,
    ranks_of,
    warn_of_other_alphas,
)
from wanlora.adapters.header import (
    ADAPTER_FILE,
    PROVENANCE_PREFIX,
    AdapterHeader,
    opened,
    provenance_of,
    read_header,
)
from wanlora.adapters.names import Key, layout_of, names_in_file
from wanlora.adapters.targets import preset_pattern
from wanlora.adapters.updates import PREFIX, Update, updates_of
from wanlora.core import units
from wanlora.errors import AdapterError, NonFiniteError
from wanlora.files import write_atomic
from wanlora.wan.variants import Expert

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class LoraShape:
    """Settings of a LoRA that its tensors do not show.

    Attributes:
        rank: Rank r.
        alpha: Scale numerator; the update is scaled by alpha / rank.
        targets: See `target_names`.
        rslora: Scale by alpha / sqrt(rank) instead.
        dora: Train magnitudes beside directions.
    """

    rank: int
    alpha: float
    targets: str | Sequence[str] = "attention+ffn"
    rslora: bool = False
    dora: bool = False


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """Content of an adapter file, from any trainer.

    Attributes:
        path: The file.
        format: Its layout, or the closest one: diffusers, peft, comfyui or kohya.
        prefix: Prefix of its keys before the names of modules.
        tensors: Tensors by diffusers' name without prefix, `blocks.0.attn1.to_q.lora_A.weight`.
            float8 is widened to float32, which changes no value.
        metadata: PEFT settings with their prefix; always with `transformer.r`, `.lora_alpha` and
            `.target_modules`, from the file or derived from its tensors.
        header: The file's own header, unchanged.
        dtypes: Number of tensors by their type in the file.
        expert: See `AdapterHeader`.
    """

    path: Path
    format: str
    prefix: str
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    header: dict[str, str]
    dtypes: dict[str, int]
    expert: Expert | None = None

    @property
    def provenance(self) -> dict[str, str]:
        """Values that wanlora recorded beside the tensors, without the `wanlora.` prefix."""
        return provenance_of(self.header)

    def updates(self) -> dict[str, Update]:
        """Each module's update, sorted by name."""
        return updates_of(self.tensors, self.metadata)


# --- written ---


def lora_metadata(shape: LoraShape, modules: Iterable[str]) -> dict[str, Any]:
    """Return the settings that a loader needs beside the tensors, and no others.

    Minimal on purpose: other versions of peft raise an error for an unknown key. Without rank,
    alpha and the rsLoRA and DoRA flags, an adapter loads and is silently wrong.
    """
    names = sorted(set(modules))
    metadata = {
        "r": shape.rank,
        "lora_alpha": plain_number(shape.alpha),
        "target_modules": preset_pattern(shape.targets, names) or names,
    }
    metadata |= {"use_rslora": True} if shape.rslora else {}
    metadata |= {"use_dora": True} if shape.dora else {}
    return {f"{PREFIX}{key}": value for key, value in metadata.items()}


def save_adapter(
    path: Path,
    tensors: Mapping[str, Tensor],
    shape: LoraShape,
    *,
    provenance: Mapping[str, str],
) -> Path:
    """Write an adapter file atomically, in fp32; equal content gives equal bytes.

    Args:
        path: A `.safetensors` file, or a folder for `pytorch_lora_weights.safetensors`.
        tensors: fp32 masters, named as `adapter_parameters` names them.
        shape: Shape with which the adapter was added.
        provenance: Values to record beside it (model, cache, seed, ...), in keys of their own.

    Returns:
        The file.

    Raises:
        NonFiniteError: A tensor holds NaN or infinity; nothing is written.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{name} holds NaN or infinite values; {path} was not written")
    metadata = lora_metadata(shape, (name.partition(".lora_")[0] for name in tensors))
    plain = {
        f"{PREFIX}{name}": tensor.detach().to("cpu", torch.float32)
        for name, tensor in tensors.items()
    }
    header = diffusers_header(metadata) | {
        f"{PROVENANCE_PREFIX}{key}": str(value) for key, value in provenance.items()
    }
    file = path if path.suffix == ".safetensors" else path / ADAPTER_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, to_bytes(plain, header))
    return file


def diffusers_header(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Give PEFT settings the prefix that diffusers' loader expects."""
    return {LORA_HEADER: json.dumps(metadata, indent=2, sort_keys=True)}


def to_bytes(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    """Make a safetensors file with a sorted header; the library writes it in random order.

    The tensors are aligned: readers map them in place, and matrix-vector products round
    differently off a 64-byte boundary. Layout: u64 little-endian header length, JSON padded with
    spaces, tensors.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(whole, {"format": "pt", **header})
    end = 8 + int.from_bytes(data[:8], "little")
    head = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    head += b" " * (-(8 + len(head)) % _ALIGNMENT_BYTES)
    return len(head).to_bytes(8, "little") + head + data[end:]


# --- read ---


def read_adapter(path: Path) -> AdapterFile:
    """Read an adapter: a file, or the one in a run's or PEFT's folder, from any trainer.

    A module's alpha is its `.alpha` tensor; else that of diffusers' header, of
    `adapter_config.json` beside a PEFT file, or of finetrainers' header; else its rank (scale 1, as
    diffusers and ComfyUI read such files). If two of them differ, a warning names both.

    If ranks or scales differ between modules and the file is not diffusers' own, each scale is
    multiplied into its B, so that rank and alpha are the same for all modules.

    Raises:
        AdapterError: There is no adapter, there are several, or it is not a plain LoRA of Wan's
            linear modules.
    """
    return load_adapter(read_header(path))


def load_adapter(known: AdapterHeader) -> AdapterFile:
    """Read the tensors of an adapter whose header was read; see `read_adapter`."""
    file, keys, header = known.path, known.keys, known.header
    with opened(file, framework="pt") as content:
        found = {key: content.get_tensor(key) for key in keys}
    tensors, alphas = _in_our_names(file, found, keys)
    _check_pairs(file, tensors)
    layout = layout_of(keys.values())
    sources = alpha_sources(known, layout, names_in_file(keys.values()))
    if layout == "peft" and not sources and not alphas:
        raise AdapterError(
            f"{file} is in PEFT's layout, but its rank and alpha are in {PEFT_CONFIG}, which is "
            "not beside it: keep the two files in one folder"
        )
    warn_of_other_alphas(file, tensors, alphas, sources, header)
    name, settings = next(iter(sources.items()), ("", {}))
    check_ranks(file, tensors, settings, name)
    if layout == "diffusers" and name == LORA_HEADER and not alphas and f"{PREFIX}r" in settings:
        metadata = {f"{PREFIX}target_modules": sorted(ranks_of(tensors))} | settings
    else:
        tensors, metadata = completed(tensors, alphas, settings)
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in _matrices(found, keys))
    prefix = Counter(key.prefix for key in keys.values()).most_common(1)[0][0]
    return AdapterFile(file, layout, prefix, tensors, metadata, header, dict(dtypes), known.expert)


def _matrices(found: Mapping[str, Tensor], keys: Mapping[str, Key]) -> list[Tensor]:
    return [tensor for key, tensor in found.items() if keys[key].part != "alpha"]


def _in_our_names(
    file: Path, found: Mapping[str, Tensor], keys: Mapping[str, Key]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Rename a file's tensors; returns them, and the alphas that are tensors, by module."""
    endings = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name, tensor in found.items():
        key = keys[name]
        ours = f"{key.module}.{endings.get(key.part, 'alpha')}"
        if ours in tensors or (key.part == "alpha" and key.module in alphas):
            raise AdapterError(f"{file} holds {ours} twice, once as {name}; expected one adapter")
        if key.part == "alpha":
            alphas[key.module] = finite(file, name, tensor)
        elif not tensor.is_floating_point():
            raise AdapterError(f"{file}: {name} is {tensor.dtype}; expected floating-point numbers")
        else:  # float8 has no arithmetic
            tensors[ours] = tensor.float() if tensor.element_size() == 1 else tensor
    return dict(sorted(tensors.items())), alphas


def _check_pairs(file: Path, tensors: Mapping[str, Tensor]) -> None:
    problems = []
    for module in {name.partition(".lora_")[0]: None for name in tensors}:
        a, b = (tensors.get(f"{module}.lora_{matrix}.weight") for matrix in "AB")
        if a is None or b is None:
            problems.append(f"{module} has no lora_{'A' if a is None else 'B'}")
        elif a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            problems.append(f"{module}: A is {tuple(a.shape)}, B is {tuple(b.shape)}")
    if problems:
        raise AdapterError(
            f"{file} is damaged or not a LoRA: expected A (rank, in) and B (out, rank) for each "
            f"module; found {units.names(problems, separator='; ')}"
        )
