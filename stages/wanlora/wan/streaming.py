"""Frozen weights of some blocks in host memory, copied to the device just before they are used.

Owns: the host copies, the slots on the device, and the times of copying. Must not know: adapters,
training, files.

The k-th streamed block has slot k mod NUM_SLOTS for its whole life: its parameters are tensors of
that slot, so addresses never change, and a compiled block needs no new guard. A slot holds one
block at a time. The rules, in forward order and in reverse:

- before a block runs, forward or backward, its weights are in its slot (`enter`);
- when it has run, its slot is refilled with the next block of that slot (`leave`), on a separate
  stream, while other blocks run.

Gradients are right: autograd keeps references to frozen weights, that is to the slot, in every
recompute mode. `enter` runs before the first operator of the block's backward pass, because it is a
hook of the block's output, and restores the bytes that the forward pass read. `leave` is a hook of
the block's input. Autograd runs the ready node that was created last first, so all nodes of the
block, which were created after its input, have run by then.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wanlora.core import units
from wanlora.cost.flops import TransformerShape
from wanlora.cost.memory import NUM_SLOTS, Quantize, block_linear_bytes, streamed_blocks
from wanlora.cost.streaming import require_blocks
from wanlora.wan.host_memory import HostBytes, require_host_memory
from wanlora.wan.pinned import HostBuffer

_ENTRY = "_wanlora_entry"
"""Attribute of a streamed block: its `_Entry`."""
_ALIGNMENT = 256
"""Offsets of weights in a host buffer are multiples of this."""

Call = Callable[..., Any]

logger = logging.getLogger(__name__)


def stream_blocks(
    transformer: nn.Module, num_streamed: int, *, device: torch.device, slots: int = NUM_SLOTS
) -> None:
    """Move the linear weights of some blocks to host memory; from now on they are streamed.

    All other parameters, adapters among them, are moved to the device. The results of the
    transformer and all gradients stay the same, bit for bit. Do not move or cast the transformer
    afterwards.

    Args:
        transformer: Frozen transformer, with or without adapters, on the device or on the CPU.
        num_streamed: Number of streamed blocks; 0 changes nothing.
        device: Device to compute on. On a CPU the weights are copied all the same, for tests.
        slots: Blocks whose weights are on the device at a time.

    Raises:
        DeviceError: The host memory cannot be pinned.
    """
    blocks: Any = transformer.blocks
    indices = streamed_blocks(len(blocks), num_streamed)
    if not indices:
        return
    first = [linear.weight for linear in _frozen_linears(blocks[indices[0]])]
    copies = _GpuCopies(device) if device.type == "cuda" else _CpuCopies()
    ring = _Ring(first, copies, device, min(slots, len(indices)))
    for order, index in enumerate(indices):
        ring.take(blocks[index])  # frees its own weights before the next block is copied
        setattr(blocks[index], _ENTRY, _Entry(ring, order))
        surround(blocks[index])
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        tensor.data = tensor.data.to(device)


def has_streamed_blocks(transformer: nn.Module) -> bool:
    """Return whether blocks of a transformer are streamed."""
    blocks: Any = transformer.blocks
    return any(hasattr(block, _ENTRY) for block in blocks)


def require_streaming(
    shape: TransformerShape,
    num_streamed: int,
    dtype: torch.dtype,
    num_copies: int = 1,
    *,
    quantize: Quantize = "none",
) -> None:
    """Check that blocks can be streamed, and log what is kept in host memory.

    Args:
        shape: The transformer.
        num_streamed: Number of streamed blocks.
        dtype: Type of their weights.
        num_copies: Transformers with copies of their own: of the processes of this machine, or of
            a pipeline.
        quantize: Format of the weights.

    Raises:
        ConfigError: The transformer has fewer blocks.
        DeviceError: The host memory is too small.
    """
    require_blocks(shape.num_layers, num_streamed)
    if num_streamed:
        each = num_streamed * block_linear_bytes(shape, dtype.itemsize, quantize)
        require_host_memory(
            HostBytes(kept=int(num_copies * each)),
            f"streaming {num_streamed} blocks of {units.count(num_copies, 'transformer')}",
            "a smaller --stream-blocks", "fewer processes per machine",
        )  # fmt: skip
        logger.info(
            "streaming %d of %d blocks: %s of host memory for each transformer",
            num_streamed, shape.num_layers, units.size(each),
        )  # fmt: skip


def surround(block: nn.Module) -> None:
    """Make calls of a streamed block fetch its weights; for a resident block do nothing.

    Call it again after `block.compile()`. The fetching is outside the compiled graph.
    """
    entry: _Entry | None = getattr(block, _ENTRY, None)
    if entry:
        # The attribute of nn.Module.compile: what calling the module runs instead of `_call_impl`.
        inner = block._compiled_call_impl or block._call_impl  # noqa: SLF001
        entry.call = inner
        block._compiled_call_impl = partial(entry.run, inner)  # noqa: SLF001


def run_with_weights(block: nn.Module, runner: Call, *, compiled: bool) -> Call:
    """Return a function of a block's inputs that runs it with its weights on the device.

    Args:
        block: The block.
        runner: Function of the block and its inputs, which may recompute it.
        compiled: The runner is compiled, with the block inside its graph.
    """
    entry: _Entry | None = getattr(block, _ENTRY, None)
    if entry is None:
        return partial(runner, block)
    return partial(entry.run, partial(runner, block if compiled else entry.call))


class _Entry:
    """A streamed block's place in the ring.

    Attributes:
        call: The block's own function, eager or compiled, without fetching.
    """

    call: Call

    def __init__(self, ring: "_Ring", order: int) -> None:
        self._ring = ring
        self._order = order

    def run(self, call: Call, hidden_states: Tensor, *inputs: Any) -> Tensor:
        """Run the block once, and fetch its weights again before its backward pass.

        Args:
            call: Function that runs the block.
            hidden_states: Its input, which is the output of the block before it.
            inputs: Its other inputs.
        """
        ring, order = self._ring, self._order
        ring.enter(order)
        output: Tensor = call(hidden_states, *inputs)
        if output.requires_grad:
            _at_gradient(output, partial(ring.enter, order))
            if hidden_states.requires_grad:
                _at_gradient(hidden_states, partial(ring.leave, order, -1))
        ring.leave(order, 1, again=not output.requires_grad)
        return output


class _Ring:
    """Slots on the device, and the block that each holds or is being filled with."""

    def __init__(
        self, weights: Sequence[Tensor], copies: "_Copies", device: torch.device, slots: int
    ) -> None:
        self._copies = copies
        self._device = device
        self._slots = [
            [torch.empty_like(weight, device=device) for weight in weights] for _ in range(slots)
        ]
        self._holds: list[int | None] = [None] * slots
        self._sources: list[_HostWeights] = []
        self._parameters: list[list[Tensor]] = []

    def take(self, block: nn.Module) -> None:
        """Copy the weights of the next block to host memory, and replace them by its slot's."""
        slot = self._slots[len(self._sources) % len(self._slots)]
        linears = list(_frozen_linears(block))
        self._sources.append(_HostWeights([linear.weight.data for linear in linears], self._device))
        for linear, weight in zip(linears, slot, strict=True):
            # `data` has its own version counter, so autograd does not count copies as changes.
            linear.weight = nn.Parameter(weight.data, requires_grad=False)
        parameters: list[Tensor] = [linear.weight for linear in linears]
        self._parameters.append(parameters)

    def enter(self, order: int) -> None:
        """Have the weights of a block in its slot for what is queued on the device from now on."""
        slot = order % len(self._slots)
        first, own = self._slots[slot][0], self._parameters[order][0]
        assert own.data_ptr() == first.data_ptr(), "a transformer with streamed blocks was moved"
        self._fill(slot, order)
        self._copies.finish(slot)

    def leave(self, order: int, direction: int, *, again: bool = False) -> None:
        """Fill the slot of a block that has run with the next block of the slot.

        Without a next block the slot keeps its block: the pass turns around here.

        Args:
            order: The block that has run.
            direction: 1 forward, -1 backward.
            again: No backward pass follows, so the first block of the slot is the next.
        """
        slot, following = order % len(self._slots), order + direction * len(self._slots)
        if 0 <= following < len(self._sources):
            self._fill(slot, following)
        elif again:
            self._fill(slot, slot)

    def _fill(self, slot: int, order: int) -> None:
        if self._holds[slot] != order:
            self._holds[slot] = order
            self._copies.start(slot, self._slots[slot], self._sources[order])


class _HostWeights:
    """Weights of a block in one buffer of host memory; pinned if the device is a GPU.

    Attributes:
        weights: Views of the buffer.
    """

    def __init__(self, originals: Sequence[Tensor], device: torch.device) -> None:
        starts = [0]
        for weight in originals:
            starts.append(starts[-1] + -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT)
        self._buffer = HostBuffer(starts[-1], device)
        self.weights = [
            self._buffer.view_as(weight, start)
            for start, weight in zip(starts, originals, strict=False)
        ]
        for own, weight in zip(self.weights, originals, strict=True):
            own.copy_(weight)


class _GpuCopies:
    """Copies on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done: dict[int, torch.cuda.Event] = {}

    def start(self, slot: int, targets: Sequence[Tensor], source: _HostWeights) -> None:
        """Copy once all that is queued on the device now, and may read the slot, has run."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, weight in zip(targets, source.weights, strict=True):
                target.copy_(weight, non_blocking=True)
                # The slot may be freed before this copy ends: a pass fills slots for the next one.
                target.record_stream(self._stream)
            self._done[slot] = self._stream.record_event()

    def finish(self, slot: int) -> None:
        """Let what is queued on the device from now on wait for the slot's copy."""
        torch.cuda.current_stream(self._device).wait_event(self._done[slot])


class _CpuCopies:
    """Stand-in for copies on a stream: a slot has no usable value until its copy is waited for.

    A GPU may overwrite a slot at any time between the two calls. Here it has wrong values between
    them, and the right ones after them.
    """

    def __init__(self) -> None:
        self._started: dict[int, tuple[Sequence[Tensor], _HostWeights]] = {}

    def start(self, slot: int, targets: Sequence[Tensor], source: _HostWeights) -> None:
        """Spoil the slot."""
        for target in targets:
            target.fill_(float("nan") if target.is_floating_point() else -128)
        self._started[slot] = targets, source

    def finish(self, slot: int) -> None:
        """Copy."""
        if slot in self._started:
            targets, source = self._started.pop(slot)
            for target, weight in zip(targets, source.weights, strict=True):
                target.copy_(weight)


_Copies = _GpuCopies | _CpuCopies


def _at_gradient(tensor: Tensor, action: Callable[[], None]) -> None:
    """Call a function when the gradient of a tensor is complete, before it is used."""

    def hook(_gradient: Tensor) -> None:
        action()

    tensor.register_hook(hook)  # type: ignore[no-untyped-call]


def _frozen_linears(block: nn.Module) -> Iterator[nn.Linear]:
    """List the linear layers of a block that are the base's, in the order of the block."""
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            yield module
