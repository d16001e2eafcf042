"""fp32 master weights and gradients of a bf16 adapter, and their moving average.

Owns: every change of adapter weights. The transformer computes with adapters in the
base's type. In bf16 an update of 5e-5 to a weight of 0.02 would be lost, and summing eight
micro-batches would have an error of 0.33 % of the gradient instead of 0.08 %.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from wanlora.core.units import count
from wanlora.core.units import names as first_names
from wanlora.errors import CheckpointError


class Masters:
    """fp32 copies of adapter parameters with fp32 gradients.

    Args:
        adapter: Adapter parameters of the transformer by name; `publish` writes to them.
    """

    def __init__(self, adapter: Mapping[str, torch.nn.Parameter]) -> None:
        self._adapter = dict(adapter)
        self.parameters = {
            name: torch.nn.Parameter(parameter.detach().to(torch.float32, copy=True))
            for name, parameter in self._adapter.items()
        }
        # One tensor for all gradients: summing and clearing them are one operation each.
        masters = list(self.parameters.values())
        self.flat_gradient = torch.zeros(
            sum(master.numel() for master in masters), device=masters[0].device
        )
        parts = torch.split(self.flat_gradient, [master.numel() for master in masters])
        for master, part in zip(masters, parts, strict=True):
            master.grad = part.view_as(master)

    @property
    def modules(self) -> frozenset[str]:
        """Names of the adapted modules, for example `blocks.0.attn1.to_q`."""
        return frozenset(name.partition(".lora_")[0] for name in self.parameters)

    def accumulate(self) -> None:
        """Add the adapter's gradients to the masters' and clear them; after each backward."""
        given = [(n, p) for n, p in self._adapter.items() if p.grad is not None]
        if given:
            torch._foreach_add_(
                [_gradient(self.parameters[name]) for name, _ in given],
                [_gradient(parameter) for _, parameter in given],
            )
        for _, parameter in given:
            parameter.grad = None

    def sum_over_ranks(self) -> None:
        """Sum the gradients of all ranks in one all-reduce."""
        dist.all_reduce(self.flat_gradient)

    def clip(self, max_norm: float) -> Tensor:
        """Clip the global L2 norm, once per step, and return the norm before; 0 = only measure."""
        return torch.nn.utils.clip_grad_norm_(
            self.parameters.values(), max_norm if max_norm > 0 else torch.inf
        )

    def clear_gradient_if(self, is_bad: Tensor) -> None:
        """Clear the gradients if a condition on the device is true, without waiting for its value.

        Args:
            is_bad: A boolean scalar on the device.
        """
        self.flat_gradient.masked_fill_(is_bad, 0.0)

    def zero_grad(self) -> None:
        """Clear the gradients, for the next step."""
        self.flat_gradient.zero_()

    def publish(self) -> None:
        """Copy the masters into the adapter, rounded to its type; after each optimizer step."""
        self._copy(self.parameters)

    @contextmanager
    def replaced_by(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Use other values in the adapter inside the block, for example a moving average.

        Args:
            tensors: Values by the masters' names; rounded to the adapter's type.
        """
        self._copy(tensors)
        try:
            yield
        finally:
            self.publish()

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        torch._foreach_copy_(
            list(self._adapter.values()), [tensors[name] for name in self._adapter]
        )

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load masters from a checkpoint, and publish them.

        Raises:
            CheckpointError: A tensor is missing, unknown or of another shape.
        """
        check_same_tensors(self.parameters, tensors)
        for name, master in self.parameters.items():
            master.copy_(tensors[name])
        self.publish()


class MovingAverage:
    """Exponential moving average of the masters; smoother than the last step's weights.

    Args:
        masters: The averaged weights.
        decay: Weight of the past at each step, below 1.
    """

    def __init__(self, masters: Masters, decay: float) -> None:
        self._masters = masters
        self._decay = decay
        self.tensors = {name: p.detach().clone() for name, p in masters.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Average <- decay average + (1 - decay) master; after each optimizer step."""
        for name, average in self.tensors.items():
            average.lerp_(self._masters.parameters[name], 1.0 - self._decay)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the average from a checkpoint.

        Raises:
            CheckpointError: A tensor is missing, unknown or of another shape.
        """
        check_same_tensors(self.tensors, tensors)
        for name, average in self.tensors.items():
            average.copy_(tensors[name])


def check_same_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Refuse tensors of other names or shapes.

    Raises:
        CheckpointError: Names the first few.
    """
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    reshaped = [
        f"{name} (found {tuple(found[name].shape)}, expected {tuple(expected[name].shape)})"
        for name in sorted(expected.keys() & found.keys())
        if expected[name].shape != found[name].shape
    ]
    problems = [
        *_listed("missing", missing),
        *_listed("not of this adapter", unknown),
        *_listed("of another shape", reshaped),
    ]
    if problems:
        raise CheckpointError("; ".join(problems))


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _listed(what: str, names: Sequence[str]) -> list[str]:
    return [f"{count(len(names), 'tensor')} {what}: {first_names(names)}"] if names else []
