"""Inputs of recomputed blocks in host memory, from the forward to the backward pass.

Owns: the copies of a block's input, and their times. Must not know: weights, adapters, what a block
computes.

A block that recomputes everything keeps only its input, one value per feature of each token. Here a
GPU keeps the inputs of the last two blocks that ran; the others are copied to pinned host memory on
a separate stream while blocks run, and back before their block's backward pass. No bit changes.
"""

import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from wanlora.wan.pinned import HostBuffer

NUM_KEPT = 2
"""Inputs on the device at a time."""


class SavedInputs:
    """Host copies of the inputs of a transformer's blocks, for passes with gradients."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._free: list[HostBuffer] = []
        self._kept: deque[_Saved] = deque()
        self._last: Callable[[], _Saved | None] = _nothing

    def run(
        self, runner: Callable[..., Any], block: Any, hidden_states: Tensor, *inputs: Any
    ) -> Any:
        """Run a block; what autograd keeps of `hidden_states` is kept in host memory.

        Args:
            runner: Function of the block and its inputs that keeps only the inputs.
            block: The block.
            hidden_states: Its first input.
            inputs: Its other inputs, which blocks share.
        """
        # autograd keeps the hooks, so they must not refer to the tensor.
        pack = partial(self._pack, hidden_states.data_ptr(), hidden_states.nbytes)
        with saved_tensors_hooks(pack, _unpack):
            return runner(block, hidden_states, *inputs)

    def _pack(self, address: int, num_bytes: int, tensor: Tensor) -> "Tensor | _Saved":
        if (tensor.data_ptr(), tensor.nbytes) != (address, num_bytes):
            return tensor
        assert tensor.is_contiguous(), "a block's input has gaps"
        saved = _Saved(self, self.buffer(tensor.nbytes), tensor.detach(), self._last)
        self._last = weakref.ref(saved)
        self._kept.append(saved)
        while len(self._kept) > NUM_KEPT:
            self._kept.popleft().drop()
        return saved

    def buffer(self, num_bytes: int) -> HostBuffer:
        """Take a host buffer that no saved input uses."""
        while self._free:
            buffer = self._free.pop()
            if buffer.num_bytes >= num_bytes:
                return buffer
        return HostBuffer(num_bytes, self._device)

    def give_back(self, buffer: HostBuffer) -> None:
        """Return a buffer. Copies run in order, so one from it ends before the next one into it."""
        self._free.append(buffer)

    def release(self) -> None:
        """Stop keeping inputs on the device for blocks that may run next."""
        self._kept.clear()

    def copy(self, target: Tensor, source: Tensor) -> "torch.cuda.Event | None":
        """Start a copy after all that is queued on the device; return the event of its end."""
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event: torch.cuda.Event = self._stream.record_event()
        return event

    def wait(self, event: "torch.cuda.Event | None") -> None:
        """Let what is queued on the device from now on wait for a copy."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


class _Saved:
    """One input: on the device, in host memory, or both."""

    def __init__(
        self,
        owner: SavedInputs,
        buffer: HostBuffer,
        tensor: Tensor,
        before: "Callable[[], _Saved | None]",
    ) -> None:
        self._owner, self._before, self._buffer = owner, before, buffer
        self._event: torch.cuda.Event | None = None
        self._host = buffer.view_as(tensor)
        self._tensor: Tensor | None = tensor
        self._event = owner.copy(self._host, tensor)

    def drop(self) -> None:
        """Refer to the host memory only, once copies have ended."""
        self._owner.wait(self._event)
        self._tensor = self._event = None

    def fetch(self) -> None:
        """Start to copy the input back, if it is not on the device."""
        if self._tensor is None:
            self._tensor = torch.empty_like(self._host, device=self._owner._device)  # noqa: SLF001
            self._event = self._owner.copy(self._tensor, self._host)

    def value(self) -> Tensor:
        """Return the input, and start to fetch that of the block before."""
        self.fetch()
        tensor = self._tensor
        assert tensor is not None
        self._owner.release()
        self.drop()  # autograd may keep this object until the end of the pass
        if (before := self._before()) is not None:
            before.fetch()
        return tensor

    def __del__(self) -> None:
        self.drop()  # after a failed pass a copy may still write to the tensor
        self._owner.give_back(self._buffer)


def _unpack(saved: "Tensor | _Saved") -> Tensor:
    return saved.value() if isinstance(saved, _Saved) else saved


def _nothing() -> None:
    return None
