"""The adapter: LoRA matrices in the transformer, and contract 3, the file they are kept in.

Owns: which modules are adapted, how the matrices start, their names, and diffusers' LoRA file
layout, so that `WanPipeline.load_lora_weights(folder)` reads what is written here. Must not import
a pipeline, the VAE or the text encoder.

Legend: A is `rank in_features`, B is `out_features rank`; the update is (alpha / rank) B A.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from diffusers import WanTransformer3DModel
from jaxtyping import Float32
from peft import LoraConfig

from wanlora.core.rng import Stream, generator
from wanlora.errors import AdapterError, NonFiniteError
from wanlora.files import write_atomic
from wanlora.wan.targets import preset_pattern, target_names

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
PROVENANCE_PREFIX = "wanlora."

_NAME = "default"
_ALIGNMENT_BYTES = 64
_LORA_HEADER = "lora_adapter_metadata"


@dataclass(frozen=True, slots=True)
class LoraShape:
    """What a LoRA is, beyond its numbers.

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
    """What an adapter file holds.

    Attributes:
        path: The file.
        tensors: By name without prefix, `blocks.0.attn1.to_q.lora_A.weight`.
        metadata: PEFT settings with their prefix (`transformer.r`, ...); empty in a file that
            another tool wrote without.
        provenance: What this project recorded beside them, without the `wanlora.` prefix.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any]
    provenance: dict[str, str]


# --- in the model ---


def add_adapter(
    transformer: WanTransformer3DModel, shape: LoraShape, *, seed: int
) -> dict[str, torch.nn.Parameter]:
    """Put a LoRA into a frozen transformer; only its matrices require gradients afterwards.

    A starts as `initial_value`, B as zeros: the output is bit-equal to the base's. The matrices
    have the dtype of the layer they sit on.

    Args:
        transformer: From `load_transformer`.
        shape: Rank, scale and place.
        seed: Decides A, whatever the global random state or the base's dtype.

    Returns:
        `adapter_parameters`.

    Raises:
        AdapterError: A target matches nothing.
    """
    names = target_names(transformer, shape.targets)
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=_plain_number(shape.alpha),
        target_modules=preset_pattern(shape.targets) or names,
        lora_dropout=0.0,
        use_rslora=shape.rslora,
        use_dora=shape.dora,
    )
    with torch.random.fork_rng(devices=[]):  # peft draws A too, from the global state
        transformer.add_adapter(config, _NAME)
    parameters = adapter_parameters(transformer)
    adapted = {name.partition(".lora_")[0] for name in parameters}
    assert adapted == set(names), "peft adapted other modules than those chosen"
    with torch.no_grad():
        for name, parameter in parameters.items():
            if not name.endswith("lora_magnitude_vector"):
                parameter.copy_(initial_value(name, tuple(parameter.shape), seed))
    return parameters


def initial_value(
    name: str, shape: tuple[int, ...], seed: int
) -> Float32[torch.Tensor, "rows cols"]:
    """Draw the first value of an A or B matrix in fp32.

    A ~ U(-1/sqrt(in), 1/sqrt(in)), which is kaiming-uniform with a = sqrt(5), peft's default; B is
    zero. A function of (seed, name) alone. A bfloat16 adapter holds its rounding; a fp32 master
    should start from this.

    Args:
        name: As in `adapter_parameters`.
        shape: `rank in_features` or `out_features rank`.
        seed: The run's seed.
    """
    if name.endswith("lora_B.weight"):
        return torch.zeros(shape)
    word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    bound = 1.0 / math.sqrt(shape[1])
    draw = generator(seed, Stream.INIT, word).random(shape, dtype="float32")
    return torch.from_numpy((2.0 * draw - 1.0) * bound).float()


def initial_values(
    parameters: Mapping[str, torch.nn.Parameter], seed: int
) -> dict[str, torch.Tensor]:
    """First fp32 value of every parameter: what masters start from, not its bf16 rounding.

    DoRA magnitudes are the norms of the base's weights, so they are taken from the parameter.
    """
    return {
        name: parameter.detach().float()
        if name.endswith("lora_magnitude_vector")
        else initial_value(name, tuple(parameter.shape), seed)
        for name, parameter in parameters.items()
    }


def adapter_parameters(transformer: WanTransformer3DModel) -> dict[str, torch.nn.Parameter]:
    """Find the adapter's parameters, sorted, named as in the file but for its prefix.

    For example `blocks.0.attn1.to_q.lora_A.weight`; a DoRA magnitude ends in
    `lora_magnitude_vector`.
    """
    found = {
        _file_name(name): parameter
        for name, parameter in transformer.named_parameters()
        if ".lora_" in name
    }
    return dict(sorted(found.items()))


def check_adapter_fits(adapter: AdapterFile, transformer: torch.nn.Module) -> None:
    """Refuse an adapter made for another model before anything is loaded.

    Raises:
        AdapterError: A tensor's module is not in the transformer, or its shape or rank differs.
    """
    modules = dict(transformer.named_modules())
    rank = adapter.metadata.get(f"{PREFIX}r")
    problems = []
    for name, tensor in adapter.tensors.items():
        target, _, kind = name.partition(".lora_")
        module = modules.get(target)
        module = getattr(module, "base_layer", module)
        if not isinstance(module, torch.nn.Linear):
            problems.append(f"{name}: the model has no linear module {target}")
            continue
        found = tuple(tensor.shape)
        size = rank if rank is not None else found[0] if kind.startswith("A") else found[-1]
        expected = {
            "A.weight": (size, module.in_features),
            "B.weight": (module.out_features, size),
        }.get(kind, (module.out_features,))
        if found != expected:
            problems.append(f"{name}: expected {expected}, found {found}")
    if problems:
        raise AdapterError(
            f"the adapter {adapter.path} is for another model: {_some(problems, '; ')}. Pass the "
            "--model it was trained on"
        )


# --- in its file ---


def lora_metadata(shape: LoraShape, modules: Iterable[str]) -> dict[str, Any]:
    """Say what a loader must know beyond the tensors, and no more.

    Minimal on purpose: a key that another peft does not know is an error there; but without rank,
    alpha and the rsLoRA and DoRA flags an adapter loads and is silently wrong.
    """
    metadata = {
        "r": shape.rank,
        "lora_alpha": _plain_number(shape.alpha),
        "target_modules": preset_pattern(shape.targets) or sorted(set(modules)),
    }
    metadata |= {"use_rslora": True} if shape.rslora else {}
    metadata |= {"use_dora": True} if shape.dora else {}
    return {f"{PREFIX}{key}": value for key, value in metadata.items()}


def save_adapter(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    shape: LoraShape,
    *,
    provenance: Mapping[str, str],
) -> Path:
    """Write an adapter file atomically, in fp32; equal content gives equal bytes.

    Args:
        path: A `.safetensors` file, or a folder for `pytorch_lora_weights.safetensors`.
        tensors: fp32 masters, named as `adapter_parameters` names them.
        shape: As the adapter was added.
        provenance: What to record beside it (model, cache, seed, ...), in keys of its own.

    Returns:
        The file.

    Raises:
        NonFiniteError: A tensor holds NaN or infinity; nothing is written.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{name} holds NaN or infinite values; {path} was not written")
    metadata = lora_metadata(shape, (name.partition(".lora_")[0] for name in tensors))
    header = {
        "format": "pt",
        _LORA_HEADER: json.dumps(metadata, indent=2, sort_keys=True),
        **{f"{PROVENANCE_PREFIX}{key}": str(value) for key, value in provenance.items()},
    }
    plain = {
        f"{PREFIX}{name}": tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in tensors.items()
    }
    file = path if path.suffix == ".safetensors" else path / ADAPTER_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, _in_fixed_order(safetensors.torch.save(plain, header)))
    return file


def read_adapter(path: Path) -> AdapterFile:
    """Read an adapter file, or the one in a run's folder.

    Raises:
        AdapterError: There is none, there are several, or it is not a LoRA in diffusers' layout.
    """
    file = _find(path)
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        metadata = json.loads(header.get(_LORA_HEADER, "{}"))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise AdapterError(f"{file} is not a safetensors adapter: {error}") from None
    if strange := [key for key in tensors if not key.startswith(PREFIX) or ".lora_" not in key]:
        raise AdapterError(
            f"{file} is not a LoRA in diffusers' layout: expected keys such as "
            f"{PREFIX}blocks.0.attn1.to_q.lora_A.weight, found {_some(strange)}"
        )
    if not tensors:
        raise AdapterError(f"{file} holds no tensors")
    return AdapterFile(
        path=file,
        tensors={key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()},
        metadata=metadata,
        provenance={
            key.removeprefix(PROVENANCE_PREFIX): value
            for key, value in header.items()
            if key.startswith(PROVENANCE_PREFIX)
        },
    )


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise AdapterError(f"no adapter at {path}; expected a run's folder or a .safetensors file")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise AdapterError(f"{path} holds no {ADAPTER_FILE}; has the run saved an adapter yet?")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise AdapterError(f"{path} holds {len(files)} adapters ({names}); pass the file itself")
    return files[0]


def _file_name(parameter_name: str) -> str:
    """`m.lora_A.default.weight` to `m.lora_A.weight`; peft drops `.weight` of a magnitude."""
    name = parameter_name.replace(f".{_NAME}.", ".", 1)
    return name.removesuffix(".weight") if ".lora_magnitude_vector." in name else name


def _in_fixed_order(data: bytes) -> bytes:
    """Sort a safetensors header, which the library writes in random order, and align the tensors.

    Layout: u64 little-endian header length, JSON padded with spaces, tensors. Readers map tensors
    where they lie, and matrix-vector products round differently off a 64-byte boundary.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT_BYTES)
    return len(header).to_bytes(8, "little") + header + data[end:]


def _plain_number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _some(items: Sequence[str], separator: str = ", ", limit: int = 3) -> str:
    more = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more
