"""Contract 3, the adapter's file: ours in diffusers' layout, and anybody's read as if it were ours.

Owns: `AdapterFile`, reading any of the four layouts into it, and writing ours, so that
`WanPipeline.load_lora_weights(folder)` reads what is written here.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from wanlora.errors import AdapterError, NonFiniteError
from wanlora.files import write_atomic
from wanlora.wan.adapter.names import LAYOUTS, layout_of, split_key
from wanlora.wan.adapter.updates import PREFIX, Update, alpha_of, folded, scale_of, updates_of
from wanlora.wan.targets import preset_pattern

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
PEFT_CONFIG = "adapter_config.json"
PROVENANCE_PREFIX = "wanlora."

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
    """What an adapter file holds, whoever wrote it.

    Attributes:
        path: The file.
        format: Its layout: diffusers, peft, comfyui or kohya.
        tensors: By diffusers' name without prefix, `blocks.0.attn1.to_q.lora_A.weight`.
        metadata: PEFT settings with their prefix; always with `transformer.r`, `.lora_alpha` and
            `.target_modules`, as the file says or as its tensors tell.
        header: The file's own header, as it is.
    """

    path: Path
    format: str
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    header: dict[str, str]

    @property
    def provenance(self) -> dict[str, str]:
        """What this project recorded beside the tensors, without the `wanlora.` prefix."""
        return {
            key.removeprefix(PROVENANCE_PREFIX): value
            for key, value in self.header.items()
            if key.startswith(PROVENANCE_PREFIX)
        }

    def updates(self) -> dict[str, Update]:
        """Each module's update, sorted by name."""
        return updates_of(self.tensors, self.metadata)


# --- written ---


def lora_metadata(shape: LoraShape, modules: Iterable[str]) -> dict[str, Any]:
    """Say what a loader must know beyond the tensors, and no more.

    Minimal on purpose: a key that another peft does not know is an error there; but without rank,
    alpha and the rsLoRA and DoRA flags an adapter loads and is silently wrong.
    """
    metadata = {
        "r": shape.rank,
        "lora_alpha": plain_number(shape.alpha),
        "target_modules": preset_pattern(shape.targets) or sorted(set(modules)),
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
    """Put PEFT settings where diffusers' loader looks for them."""
    return {_LORA_HEADER: json.dumps(metadata, indent=2, sort_keys=True)}


def to_bytes(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    """Make a safetensors file: its header sorted, which the library writes in random order.

    The tensors are aligned: readers map them where they lie, and matrix-vector products round
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
    """Read an adapter: a file, or the one in a run's or PEFT's folder, in any of the four layouts.

    Where ranks or scales differ between modules and the file is not diffusers' own, each scale is
    multiplied into its B, so that the metadata says it all.

    Raises:
        AdapterError: There is none, there are several, or it is no LoRA of a known layout.
    """
    file = _find(path)
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            found = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        settings = json.loads(header.get(_LORA_HEADER, "{}"))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise AdapterError(f"{file} is not a safetensors adapter: {error}") from None
    layout, tensors, alphas = _in_our_names(file, found)
    _check_pairs(file, tensors)
    if layout == "diffusers" and {f"{PREFIX}r", f"{PREFIX}lora_alpha"} <= settings.keys():
        modules = sorted({name.partition(".lora_")[0] for name in tensors})
        metadata = {f"{PREFIX}target_modules": modules} | settings
    else:
        settings = _peft_settings(file) if layout == "peft" else {}
        tensors, metadata = _completed(tensors, alphas, settings)
    return AdapterFile(file, layout, tensors, metadata, header)


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


def _in_our_names(
    file: Path, found: Mapping[str, Tensor]
) -> tuple[str, dict[str, Tensor], dict[str, float]]:
    """Rename a file's tensors; returns its layout, the tensors, and each module's own alpha."""
    if not found:
        raise AdapterError(f"{file} holds no tensors")
    layout = layout_of(found)
    if layout is None:
        keys = "; ".join(f"{name}: {item.example}" for name, item in LAYOUTS.items())
        raise AdapterError(
            f"{file} is in none of the layouts known here: expected keys such as {keys}; found "
            f"{some(sorted(found))}"
        )
    name, prefix = layout
    tensors, alphas, strange = {}, {}, []
    for key, tensor in found.items():
        written, part = split_key(key.removeprefix(prefix)) or ("", "")
        module = LAYOUTS[name].module(written) if written else None
        if module is None or (part == "alpha" and name in ("diffusers", "peft")):
            strange.append(key)
        elif part == "alpha":
            alphas[module] = float(tensor)
        elif part == "magnitude":
            tensors[f"{module}.lora_magnitude_vector"] = tensor
        else:
            tensors[f"{module}.lora_{part}.weight"] = tensor
    if strange:
        raise AdapterError(
            f"{file} holds {len(strange)} tensors that are no LoRA matrices of Wan's linear "
            f"modules: {some(sorted(strange))}. Trained biases and norms (.diff), dora_scale, LoHa "
            "and LoKr, convolutions and second experts cannot be used here"
        )
    return name, dict(sorted(tensors.items())), alphas


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
            f"{file} is damaged or no LoRA: expected A (rank, in) and B (out, rank) for each "
            f"module; found {some(problems, '; ')}"
        )


def _peft_settings(file: Path) -> dict[str, Any]:
    """Read the settings beside a PEFT file; without them its scale is anybody's guess."""
    config = file.parent / PEFT_CONFIG
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings = {f"{PREFIX}{key}": value for key, value in settings.items()}
        kind = settings.get(f"{PREFIX}peft_type")
        if kind != "LORA" or f"{PREFIX}r" not in settings:
            raise ValueError(f"peft_type {kind}, expected LORA with r and lora_alpha")
    except FileNotFoundError:
        raise AdapterError(
            f"{file} is in PEFT's layout, but its rank and alpha are in {PEFT_CONFIG}, which is "
            "not beside it: keep the two files in one folder"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise AdapterError(f"{config} is no configuration of a LoRA: {error}") from None
    return settings


def _completed(
    tensors: dict[str, Tensor], alphas: Mapping[str, float], settings: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Say in metadata what PEFT's settings, or else the tensors and their own alphas, tell.

    Without any alpha it is the rank: scale 1, as diffusers and ComfyUI read such files.
    """
    modules = sorted({name.partition(".lora_")[0] for name in tensors})
    ranks = {module: int(tensors[f"{module}.lora_A.weight"].shape[0]) for module in modules}
    rslora = bool(settings.get(f"{PREFIX}use_rslora"))
    alphas = {
        module: alpha_of(module, settings) if settings else alphas.get(module, ranks[module])
        for module in modules
    }
    if len(set(ranks.values())) > 1 or len(set(alphas.values())) > 1:
        for module, rank in ranks.items():
            scale = scale_of(alphas[module], rank, rslora=rslora)
            tensors[f"{module}.lora_B.weight"] = folded(tensors[f"{module}.lora_B.weight"], scale)
        alphas, rslora = ranks, False
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    metadata: dict[str, Any] = {
        "r": usual,
        "lora_alpha": plain_number(next(alphas[m] for m in modules if ranks[m] == usual)),
        "target_modules": modules,
        **({"rank_pattern": others, "alpha_pattern": others} if others else {}),
        **({"use_rslora": True} if rslora else {}),
        **({"use_dora": True} if any("magnitude" in name for name in tensors) else {}),
    }
    return tensors, {f"{PREFIX}{key}": value for key, value in metadata.items()}


def plain_number(value: float) -> float | int:
    """Write 8.0 as 8, as PEFT does."""
    return int(value) if float(value).is_integer() else value


def some(items: Sequence[str], separator: str = ", ", limit: int = 3) -> str:
    """List the first few of many things in a message."""
    more = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more
