"""LoRA matrices in the transformer: which modules are adapted, and how the matrices start.

Owns: adding an adapter to a frozen transformer, first values, names, and whether a file fits. Must
not import a pipeline, the VAE or the text encoder.

Legend: A is `rank in_features`, B is `out_features rank`; the update is (alpha / rank) B A.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from diffusers import WanTransformer3DModel
from jaxtyping import Float32
from peft import LoraConfig

from wanlora.adapters.alphas import plain_number
from wanlora.adapters.file import AdapterFile, LoraShape
from wanlora.adapters.targets import match_targets, preset_pattern
from wanlora.adapters.updates import rank_of
from wanlora.core import units
from wanlora.core.rng import Stream, generator
from wanlora.errors import AdapterError

_NAME = "default"


def target_names(transformer: torch.nn.Module, targets: str | Sequence[str]) -> list[str]:
    """List the linear modules of a transformer that `targets` selects (`match_targets`)."""
    linears = [
        name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    return match_targets(linears, targets)


def add_adapter(
    transformer: WanTransformer3DModel, shape: LoraShape, *, seed: int
) -> dict[str, torch.nn.Parameter]:
    """Put a LoRA into a frozen transformer; only its matrices require gradients afterwards.

    A starts as `initial_value`, B as zeros: the output is bit-equal to the base's. The matrices
    have the dtype of their layer.

    Args:
        transformer: From `load_transformer`.
        shape: Rank, scale and targets.
        seed: Determines A, independent of the global random state and the base's dtype.

    Returns:
        `adapter_parameters`.

    Raises:
        AdapterError: A target matches nothing.
    """
    names = target_names(transformer, shape.targets)
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=plain_number(shape.alpha),
        target_modules=preset_pattern(shape.targets, names) or names,
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
    """Find the adapter's parameters, sorted, with the names of the file without its prefix.

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
    problems = []
    for name, tensor in adapter.tensors.items():
        target, _, kind = name.partition(".lora_")
        module = modules.get(target)
        module = getattr(module, "base_layer", module)
        if not isinstance(module, torch.nn.Linear):
            problems.append(f"{name}: the model has no linear module {target}")
            continue
        found = tuple(tensor.shape)
        rank = rank_of(target, adapter.metadata)
        expected = {
            "A.weight": (rank, module.in_features),
            "B.weight": (module.out_features, rank),
        }.get(kind, (module.out_features,))
        if found != expected:
            problems.append(f"{name}: expected {expected}, found {found}")
    if problems:
        raise AdapterError(
            f"the adapter {adapter.path} is for another model: "
            f"{units.names(problems, separator='; ')}. Pass the --model it was trained on"
        )


def _file_name(parameter_name: str) -> str:
    """`m.lora_A.default.weight` to `m.lora_A.weight`; peft drops `.weight` of a magnitude."""
    name = parameter_name.replace(f".{_NAME}.", ".", 1)
    return name.removesuffix(".weight") if ".lora_magnitude_vector." in name else name
