"""Optimizers by name, and their tensors by parameter name.

Owns: the table of optimizers; to add one, a function and a row. Must not know the loop.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from wanlora.config import OptimizerSettings
from wanlora.errors import CheckpointError, ConfigError

Parameters = Iterable[dict[str, Any]]


def _adamw(parameters: Parameters, rate: float, settings: OptimizerSettings) -> Any:
    return torch.optim.AdamW(parameters, lr=rate, **_common(settings))


def _adamw8bit(parameters: Parameters, rate: float, settings: OptimizerSettings) -> Any:
    return _library("bitsandbytes.optim", "adamw8bit").AdamW8bit(
        parameters, lr=rate, **_common(settings)
    )


def _prodigy(parameters: Parameters, rate: float, settings: OptimizerSettings) -> Any:
    # safeguard_warmup: its own estimate must not grow from the small steps of a warm-up.
    return _library("prodigyopt", "prodigy").Prodigy(
        parameters, lr=rate, safeguard_warmup=True, use_bias_correction=True, **_common(settings)
    )


OPTIMIZERS: dict[str, tuple[Callable[[Parameters, float, OptimizerSettings], Any], float]] = {
    "adamw": (_adamw, 1e-4),
    "adamw8bit": (_adamw8bit, 1e-4),
    "prodigy": (_prodigy, 1.0),
}
"""Name to (constructor, learning rate when none is given)."""
_STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16}
"""Bytes per parameter of an optimizer's tensors: two moments; Prodigy keeps two more tensors."""
MAGNITUDE = "lora_magnitude_vector"
"""Part of the name of DoRA's magnitudes."""


def make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter],
    settings: OptimizerSettings,
    learning_rate: float | None,
) -> torch.optim.Optimizer:
    """Build the optimizer of some settings. DoRA's magnitudes have no weight decay.

    A magnitude is the norm of a row of W + B A, near 1 and not near 0 as B is; decay would shrink
    the base's own weights.

    Raises:
        ConfigError: Its library is not installed.
    """
    make, _ = OPTIMIZERS[settings.name]
    magnitudes = [p for name, p in parameters.items() if MAGNITUDE in name]
    others = [p for name, p in parameters.items() if MAGNITUDE not in name]
    groups: list[dict[str, Any]] = [{"params": others}]
    if magnitudes:
        groups.append({"params": magnitudes, "weight_decay": 0.0})
    optimizer: torch.optim.Optimizer = make(groups, rate_of(settings, learning_rate), settings)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # LambdaLR needs it to start anywhere but at step 0
    return optimizer


def rate_of(settings: OptimizerSettings, learning_rate: float | None) -> float:
    """Peak learning rate: the given one, else the optimizer's default."""
    return OPTIMIZERS[settings.name][1] if learning_rate is None else learning_rate


def state_of(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, Any]:
    """Everything an optimizer remembers, its tensors by parameter name."""
    group = optimizer.param_groups[0]
    return {
        "parameters": {name: optimizer.state[parameter] for name, parameter in parameters.items()},
        # Prodigy keeps its estimate of the learning rate here.
        "group": {key: value for key, value in group.items() if key not in {"params", "lr"}},
    }


def missing_bytes(optimizer: torch.optim.Optimizer, name: str, num_parameters: int) -> int:
    """Bytes of the tensors that an optimizer makes in its first step; 0 once it has them."""
    return 0 if optimizer.state else _STATE_BYTES[name] * num_parameters


def load_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    state: Mapping[str, Any],
) -> None:
    """Take what `state_of` gave.

    Raises:
        CheckpointError: A parameter's tensors are missing or of another shape.
    """
    shared = {key: value for key, value in state["group"].items() if key != "weight_decay"}
    for group in optimizer.param_groups:
        group.update(shared)
    found = state["parameters"]
    if missing := sorted(parameters.keys() - found.keys()):
        raise CheckpointError(
            f"the optimizer's tensors of {len(missing)} parameters are missing: {missing[0]}, ..."
        )
    for name, parameter in parameters.items():
        moments = found[name].get("exp_avg", parameter)
        if moments.shape != parameter.shape:
            raise CheckpointError(
                f"the optimizer's tensors of {name} have shape {tuple(moments.shape)}, expected "
                f"{tuple(parameter.shape)}"
            )
        optimizer.state[parameter] = {
            key: value.to(parameter.device)
            if isinstance(value, torch.Tensor) and value.dim()
            else value
            for key, value in found[name].items()
        }


def _common(settings: OptimizerSettings) -> dict[str, Any]:
    return {
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }


def _library(module: str, extra: str) -> Any:
    import importlib  # noqa: PLC0415  (only with an optimizer that is not torch's)

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"optimizer.name={extra} needs a library that is not installed ({error}): "
            f"pip install 'wanlora[{extra}]'"
        ) from None
