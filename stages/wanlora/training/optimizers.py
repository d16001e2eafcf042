"""Optimizers by name, and their tensors by parameter name.

Owns: the table of optimizers; to add one, a function and a row. Must not know the loop.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from wanlora.errors import CheckpointError, ConfigError

Parameters = Iterable[dict[str, Any]]


def _adamw(parameters: Parameters, options: Mapping[str, Any]) -> Any:
    return torch.optim.AdamW(parameters, **options)


def _prodigy(parameters: Parameters, options: Mapping[str, Any]) -> Any:
    # safeguard_warmup: its own estimate must not grow from the small steps of a warm-up.
    return _library("prodigyopt", "prodigy").Prodigy(
        parameters, safeguard_warmup=True, use_bias_correction=True, **options
    )


class _Kind(NamedTuple):
    """An optimizer.

    Attributes:
        make: Constructor.
        rate: Default of the learning rate.
        state_bytes: Bytes per parameter of the optimizer's tensors.
    """

    make: Callable[[Parameters, Mapping[str, Any]], Any]
    rate: float
    state_bytes: int


OPTIMIZERS = {
    "adamw": _Kind(_adamw, rate=1e-4, state_bytes=8),  # two moments
    "prodigy": _Kind(_prodigy, rate=1.0, state_bytes=16),  # two more tensors
}
MAGNITUDE = "lora_magnitude_vector"
"""Part of the name of DoRA's magnitudes."""


def make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter],
    *,
    name: str,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Build an optimizer. DoRA's magnitudes get no weight decay.

    A magnitude is the norm of a row of W + B A, near 1 and not near 0 as B is; decay would shrink
    the base's own weights.

    Raises:
        ConfigError: Its library is not installed.
    """
    magnitudes = [p for key, p in parameters.items() if MAGNITUDE in key]
    others = [p for key, p in parameters.items() if MAGNITUDE not in key]
    groups: list[dict[str, Any]] = [{"params": others}]
    if magnitudes:
        groups.append({"params": magnitudes, "weight_decay": 0.0})
    options = {"lr": learning_rate, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    optimizer: torch.optim.Optimizer = OPTIMIZERS[name].make(groups, options)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # LambdaLR needs it to start at a step other than 0
    return optimizer


def rate_of(name: str, learning_rate: float | None) -> float:
    """Peak learning rate: the given one, else the optimizer's default."""
    return OPTIMIZERS[name].rate if learning_rate is None else learning_rate


def state_of(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, Any]:
    """Complete state of an optimizer, with its tensors by parameter name."""
    group = optimizer.param_groups[0]
    return {
        "parameters": {name: optimizer.state[parameter] for name, parameter in parameters.items()},
        # Prodigy keeps its estimate of the learning rate here.
        "group": {key: value for key, value in group.items() if key not in {"params", "lr"}},
    }


def missing_bytes(optimizer: torch.optim.Optimizer, name: str, num_parameters: int) -> int:
    """Bytes of the tensors that an optimizer makes in its first step; 0 once it has them."""
    return 0 if optimizer.state else OPTIMIZERS[name].state_bytes * num_parameters


def load_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    state: Mapping[str, Any],
) -> None:
    """Load the state from `state_of`.

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


def _library(module: str, extra: str) -> Any:
    import importlib  # noqa: PLC0415  (only with an optimizer that is not torch's)

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"optimizer.name={extra} needs a library that is not installed ({error}): "
            f"pip install 'wanlora[{extra}]'"
        ) from None
