"""Alpha and rank of each module, from the fields in which trainers store them.

Owns: the precedence of those fields, the meaning of a difference between them, and complete PEFT
settings. Must not know: how keys are spelled.

Legend: the update is scale B A with scale = alpha / rank, or alpha / sqrt(rank) with rsLoRA.
"""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from wanlora.adapters.header import AdapterHeader
from wanlora.adapters.updates import PREFIX, alpha_of, folded, pattern_of, rank_of, scale_of
from wanlora.errors import AdapterError
from wanlora.wan.variants import Expert

PEFT_CONFIG = "adapter_config.json"
LORA_HEADER = "lora_adapter_metadata"
"""Field of the safetensors header in which diffusers keeps PEFT settings."""

_FINETRAINERS_HEADER = "lora_config"
_KOHYA_ALPHA = "ss_network_alpha"
_SECOND_PREFIX = "transformer_2."

logger = logging.getLogger(__name__)


def alpha_sources(
    known: AdapterHeader, layout: str, names: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Collect the settings that give an alpha, by the place they are in; the first one counts.

    Args:
        known: The adapter.
        layout: Its layout.
        names: Names of the modules in the file, by diffusers' names, if they differ: patterns of
            ranks and alphas match the former.

    Raises:
        AdapterError: Settings cannot be read.
    """
    file, header = known.path, known.header
    settings = _header_settings(file, header, LORA_HEADER, "")
    sources = {LORA_HEADER: _of_expert(settings, known.expert)}
    if layout == "peft":
        sources[PEFT_CONFIG] = _peft_settings(file)
    sources[_FINETRAINERS_HEADER] = _header_settings(file, header, _FINETRAINERS_HEADER, PREFIX)
    found = {name: each for name, each in sources.items() if f"{PREFIX}lora_alpha" in each}
    for name, each in found.items():
        finite(file, f"lora_alpha in {name}", each[f"{PREFIX}lora_alpha"])
    return {name: _with_our_names(each, names) for name, each in found.items()}


def _of_expert(settings: Mapping[str, Any], expert: Expert | None) -> dict[str, Any]:
    """Select the settings of one transformer, with the prefix of the first."""
    second = {key: value for key, value in settings.items() if key.startswith(_SECOND_PREFIX)}
    if second and expert == "low":
        return {PREFIX + key.removeprefix(_SECOND_PREFIX): item for key, item in second.items()}
    return {key: value for key, value in settings.items() if key not in second}


def _with_our_names(settings: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Replace patterns that match the file's names by the value of each module."""
    if not names:
        return settings
    result = dict(settings)
    for pattern in (f"{PREFIX}rank_pattern", f"{PREFIX}alpha_pattern"):
        values = settings.get(pattern) or {}
        keys = {module: pattern_of(name, list(values)) for module, name in names.items()}
        result[pattern] = {module: values[key] for module, key in keys.items() if key in values}
    return result


def _header_settings(
    file: Path, header: Mapping[str, str], name: str, prefix: str
) -> dict[str, Any]:
    """Read PEFT settings from a field of the header; finetrainers writes them without a prefix."""
    try:
        value = json.loads(header.get(name, "{}"))
        return {f"{prefix}{key}": item for key, item in value.items()}
    except (ValueError, AttributeError) as error:
        raise AdapterError(
            f"{file}: {name} in its header is not a JSON object ({error}); its scale is unknown"
        ) from None


def _peft_settings(file: Path) -> dict[str, Any]:
    """Read the settings beside a PEFT file; empty if there are none."""
    config = file.parent / PEFT_CONFIG
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings = {f"{PREFIX}{key}": value for key, value in settings.items()}
        kind = settings.get(f"{PREFIX}peft_type")
        if kind != "LORA" or f"{PREFIX}r" not in settings:
            raise ValueError(f"peft_type {kind}, expected LORA with r and lora_alpha")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise AdapterError(f"{config} is not the configuration of a LoRA: {error}") from None
    return settings


def check_ranks(
    file: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], name: str
) -> None:
    """Refuse settings whose rank is not that of the tensors: a loader would fail on them.

    Raises:
        AdapterError: Names the module and both ranks.
    """
    if f"{PREFIX}r" not in settings:
        return
    for module, rank in ranks_of(tensors).items():
        try:
            recorded = rank_of(module, settings)
        except (TypeError, ValueError):
            recorded = settings[f"{PREFIX}r"]
        if recorded != rank:
            raise AdapterError(
                f"{file}: {name} gives {module} rank {recorded}, and its matrices have {rank}; one "
                "of the two is of another adapter"
            )


def warn_of_other_alphas(
    file: Path,
    tensors: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    sources: Mapping[str, Mapping[str, Any]],
    header: Mapping[str, str],
) -> None:
    """Log one warning if two places give a module different alphas; the first one is used."""
    ranks = ranks_of(tensors)
    kohya = re.fullmatch(r"[\d.eE+-]+", header.get(_KOHYA_ALPHA, ""))  # may be "None"
    for module, rank in ranks.items():
        places = {".alpha": alphas[module]} if module in alphas else {}
        places |= {name: _effective_alpha(module, rank, each) for name, each in sources.items()}
        places = places or {"no alpha, which means its rank": float(rank)}
        if kohya:
            places[_KOHYA_ALPHA] = finite(file, _KOHYA_ALPHA, kohya[0])
        used, *others = places.items()
        for name, alpha in others:
            if not math.isclose(alpha, used[1], rel_tol=4e-3):  # a .alpha in bfloat16 rounds
                logger.warning(
                    "%s: alpha of %s is %g (%s), but %s gives %g; the first is used",
                    file, module, used[1], used[0], name, alpha,
                )  # fmt: skip
                return


def _effective_alpha(module: str, rank: int, settings: Mapping[str, Any]) -> float:
    """Alpha whose ratio to the rank is the scale, with rsLoRA too."""
    rslora = bool(settings.get(f"{PREFIX}use_rslora"))
    return scale_of(alpha_of(module, settings), rank, rslora=rslora) * rank


def ranks_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Map each module to its rank: the rows of its A."""
    ending = ".lora_A.weight"
    return {
        name.removesuffix(ending): int(tensor.shape[0])
        for name, tensor in tensors.items()
        if name.endswith(ending)
    }


def completed(
    tensors: dict[str, Tensor], alphas: Mapping[str, float], settings: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Express the alphas in metadata: of `.alpha` tensors, of settings, or else the ranks."""
    ranks = ranks_of(tensors)
    modules = sorted(ranks)
    rslora = bool(settings.get(f"{PREFIX}use_rslora")) and not alphas
    recorded = {
        module: (alpha_of(module, settings) if rslora else _effective_alpha(module, rank, settings))
        if settings else float(rank)
        for module, rank in ranks.items()
    }  # fmt: skip
    alphas = recorded | dict(alphas)
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


def finite(file: Path, name: str, value: Any) -> float:
    """Read an alpha.

    Raises:
        AdapterError: It is not one finite number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise AdapterError(f"{file}: {name} is {value}; expected one finite number")
    return number


def plain_number(value: float) -> float | int:
    """Write 8.0 as 8, as PEFT does."""
    return int(value) if float(value).is_integer() else value
