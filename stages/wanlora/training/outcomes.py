"""Results of a step, copied from the device without stopping it.

Owns: losses, gradient norm, and requests to stop or save, on their way to this process. They are
read one step late: the copy of a step waits only for that step, while the device already computes
the next one. So the device is never idle, every step is recorded, and all ranks get the same values
and stop together.
"""

import signal
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished step.

    Attributes:
        losses: Losses of all slots of the global batch, in slot order, so that their mean does not
            depend on the number of ranks.
        grad_norm: Gradient norm before clipping.
        stop: Signal that any rank received during the step.
        save: True if a rank requested a checkpoint during the step.
        seconds: Time of the step, measured on the device if it has a clock.
        learning_rate: Learning rate of the step.
        waited_s: Seconds that this process waited for data; a GPU may have been busy meanwhile.
    """

    step: int
    losses: np.ndarray
    grad_norm: float
    stop: signal.Signals | None
    save: bool
    seconds: float
    learning_rate: float
    waited_s: float

    @property
    def is_finite(self) -> bool:
        """True if all losses and the gradient norm are finite."""
        return bool(np.isfinite(self.losses).all() and np.isfinite(self.grad_norm))


Mark = torch.cuda.Event | float
"""A moment: an event in the queue of a GPU, or a time on other devices."""


class _Pending(NamedTuple):
    step: int
    values: Tensor
    started: Mark
    ended: Mark
    arrived: Mark
    learning_rate: float
    waited_s: float


class Outcomes:
    """Outcomes of one run on their way from the device to the host.

    Args:
        device: Device that computes the steps.
        num_ranks: Number of processes; all must call together.
    """

    def __init__(self, device: torch.device, num_ranks: int) -> None:
        self._device = device
        self._num_ranks = num_ranks
        self._pending: deque[_Pending] = deque()
        self._started = mark(device)

    def start(self) -> None:
        """Start the clock of a step: the first one, or the first after a pause."""
        self._started = mark(self._device)

    def gather(
        self,
        losses: Tensor,
        grad_norm: Tensor,
        stop: signal.Signals | None,
        *,
        save: bool = False,
    ) -> Tensor:
        """Put a step's numbers, of all ranks, into one tensor on the device.

        Args:
            losses: Losses of this rank's slots.
            grad_norm: Gradient norm, the same on all ranks.
            stop: Signal that this process received.
            save: True if this process requests a checkpoint.
        """
        # Filled on the device: copying a Python number there would wait for the device.
        flags = [torch.full_like(grad_norm, float(flag))[None] for flag in (stop or 0, save)]
        mine = torch.cat([losses, *flags])
        if self._num_ranks > 1:
            everyone = [torch.empty_like(mine) for _ in range(self._num_ranks)]
            dist.all_gather(everyone, mine)
            parts = torch.stack(everyone)
            mine = torch.cat([parts[:, :-2].flatten(), parts[:, -2:].amax(dim=0)])
        return torch.cat([mine, grad_norm[None]])

    def note(self, step: int, values: Tensor, *, learning_rate: float, waited_s: float) -> None:
        """Start the copy of the values from `gather`; the next step begins here."""
        ended = mark(self._device)
        pinned = self._device.type == "cuda"
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
        host.copy_(values.detach(), non_blocking=pinned)
        arrived = mark(self._device)
        self._pending.append(
            _Pending(step, host, self._started, ended, arrived, learning_rate, waited_s)
        )
        self._started = ended

    def arrived(self, *, all_of_them: bool) -> list[Outcome]:
        """Return the outcomes of all steps except the last, or of all; wait for them."""
        keep = 0 if all_of_them else 1
        return [self._take(self._pending.popleft()) for _ in range(len(self._pending) - keep)]

    def _take(self, pending: _Pending) -> Outcome:
        wait_for(pending.arrived)
        *losses, stop, save, grad_norm = pending.values.tolist()
        return Outcome(
            step=pending.step,
            losses=np.array(losses),
            grad_norm=grad_norm,
            stop=signal.Signals(int(stop)) if stop else None,
            save=bool(save),
            seconds=seconds_between(pending.started, pending.ended),
            learning_rate=pending.learning_rate,
            waited_s=pending.waited_s,
        )


def mark(device: torch.device) -> Mark:
    """Mark this moment in the device's queue."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def wait_for(moment: Mark) -> None:
    """Wait until the moment has passed."""
    if isinstance(moment, torch.cuda.Event):
        moment.synchronize()


def seconds_between(earlier: Mark, later: Mark) -> float:
    """Seconds from one moment to another of the same device; both must have passed."""
    if isinstance(earlier, torch.cuda.Event) and isinstance(later, torch.cuda.Event):
        return float(earlier.elapsed_time(later)) / 1000
    assert isinstance(earlier, float)
    assert isinstance(later, float)
    return later - earlier
