"""Time that copies of streamed blocks add to a step: what the blocks' own work does not hide.

Owns: the timeline of copies and blocks. The order of copies is that of `wan.streaming`: a slot is
refilled when the block in it has run, with the next block of the same slot; the backward pass runs
in reverse, and begins with the blocks that the forward pass left in the slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from wanlora.cost.flops import Recompute
from wanlora.cost.gpus import Gpu
from wanlora.cost.memory import NUM_SLOTS, Workload, block_linear_bytes, streamed_blocks
from wanlora.cost.seconds import predict_forward_seconds, predict_seconds
from wanlora.errors import ConfigError

PCIE_BYTES_PER_S = 20e9
"""Rate of copies from pinned host memory that is assumed: PCIe 4.0 with 16 lanes has 31.5e9 bytes/s
in its specification; not measured."""


def require_blocks(num_layers: int, num_streamed: int) -> None:
    """Check that a transformer has as many blocks as are streamed.

    Args:
        num_layers: Blocks of the transformer.
        num_streamed: Number of streamed blocks.

    Raises:
        ConfigError: It has fewer.
    """
    if num_streamed > num_layers:
        raise ConfigError(
            f"--stream-blocks {num_streamed}: the transformer has {num_layers} blocks; use "
            f"--stream-blocks {num_layers} to stream all of them"
        )


@dataclass(frozen=True, slots=True)
class Streaming:
    """Copies of a micro-batch, forward and backward.

    Attributes:
        copied_bytes: Bytes that are copied to the device.
        copy_s: Seconds of the copies.
        exposed_s: Seconds that the device waits for copies.
    """

    copied_bytes: float
    copy_s: float
    exposed_s: float


def predict_streaming(
    work: Workload,
    modes: Sequence[Recompute],
    gpu: Gpu,
    bytes_per_s: float = PCIE_BYTES_PER_S,
    *,
    slots: int = NUM_SLOTS,
) -> Streaming:
    """Predict the copies of a micro-batch, and the part of their time that is not hidden.

    Args:
        work: The micro-batch; its `num_streamed` blocks are copied.
        modes: Recompute mode of each block.
        gpu: The card.
        bytes_per_s: Rate of copies to the card.
        slots: Blocks whose weights are on the device at a time. With one, each block waits for its
            copy: the usual block swapping.
    """
    layers = work.shape.num_layers
    forward = predict_forward_seconds(work, gpu).times(work.batch_size).total / layers
    both = {mode: predict_seconds(work, (mode,) * layers, gpu).total / layers for mode in modes}
    backward = [both[mode] - forward for mode in modes]
    block_bytes = block_linear_bytes(work.shape, work.element_bytes, work.quantize)
    num_copies = 2 * max(0, work.num_streamed - slots)
    waits = exposed_seconds(
        [forward] * layers, backward, streamed_blocks(layers, work.num_streamed),
        copy_s=block_bytes / bytes_per_s, slots=slots,
    )  # fmt: skip
    copied = num_copies * block_bytes
    return Streaming(copied, copied / bytes_per_s, waits)


def exposed_seconds(
    forward: Sequence[float],
    backward: Sequence[float],
    streamed: Sequence[int],
    *,
    copy_s: float,
    slots: int = NUM_SLOTS,
) -> float:
    """Seconds that the device waits for copies in a forward and a backward pass.

    Args:
        forward: Seconds of each block forward.
        backward: Seconds of each block backward, recomputation included.
        streamed: Indices of the streamed blocks, rising.
        copy_s: Seconds of copying one of them.
        slots: Blocks whose weights are on the device at a time.
    """
    order_of = {block: order for order, block in enumerate(streamed)}
    layers, last = range(len(forward)), len(streamed) - 1
    visits = [(block, forward[block], slots) for block in layers]
    visits += [(block, backward[block], -slots) for block in reversed(layers)]
    ready = dict.fromkeys(range(min(slots, len(streamed))), 0.0)  # left by the last step
    now = copy_end = waited = 0.0
    for block, seconds, stride in visits:
        order = order_of.get(block)
        if order is not None:
            waited += max(0.0, ready[order] - now)
            now = max(now, ready[order])
        now += seconds
        if order is not None and 0 <= order + stride <= last:
            copy_end = max(copy_end, now) + copy_s
            ready[order + stride] = copy_end
    return waited
