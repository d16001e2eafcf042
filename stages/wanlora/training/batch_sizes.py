"""Clips per micro-batch and per step, by bucket.

Owns: the arithmetic by which steps of all buckets have the same cost. It depends on the model, the
adapter and the buckets, not on the machine, so that a run is the same on every machine.
"""

from collections.abc import Collection
from typing import Literal, NamedTuple

from wanlora.core.buckets import Bucket, num_tokens
from wanlora.cost.flops import TransformerShape, step_flops

BatchBy = Literal["clips", "cost"]
"""Quantity that is equal for the steps of all buckets."""


class BatchSize(NamedTuple):
    """Clips of one bucket in an optimizer step.

    Attributes:
        micro_batch: Clips per forward pass.
        num_micro_batches: Micro-batches per step, over all processes.
    """

    micro_batch: int
    num_micro_batches: int

    @property
    def global_batch(self) -> int:
        """Clips in a step."""
        return self.micro_batch * self.num_micro_batches

    def slots(self, *, rank: int, world: int) -> tuple[tuple[int, ...], ...]:
        """A process's slice of the global batch's slots, cut into micro-batches.

        Args:
            rank: The process.
            world: Processes; a divisor of `num_micro_batches`.
        """
        share = self.num_micro_batches // world
        return tuple(
            tuple(range(index * self.micro_batch, (index + 1) * self.micro_batch))
            for index in range(rank * share, (rank + 1) * share)
        )


def batch_sizes(
    buckets: Collection[Bucket],
    shape: TransformerShape,
    *,
    by: BatchBy,
    batch_size: int,
    accumulation: int,
    rank: int,
    adapted: Collection[str],
) -> dict[Bucket, BatchSize]:
    """Choose the clips of a step for each bucket.

    By clips, the number is the same for all buckets. By cost, a step of a bucket has the number of
    clips whose FLOPs are closest to those of `batch_size` x `accumulation` clips of the largest
    bucket. Attention is quadratic, so FLOPs grow faster than tokens, and many short clips of equal
    FLOPs would need more memory. Therefore no micro-batch has more tokens, including those of its
    prompts and images, than `batch_size` clips of the largest bucket; a step has more micro-batches
    instead.

    Args:
        buckets: At least one.
        shape: The transformer.
        by: See `BatchBy`.
        batch_size: Clips of the largest bucket in a micro-batch.
        accumulation: Micro-batches of the largest bucket in a step; every bucket's are a multiple.
        rank: Rank of the LoRA.
        adapted: Names of the adapted modules, for example `blocks.0.attn1.to_q`.
    """
    if by == "clips":
        return dict.fromkeys(buckets, BatchSize(batch_size, accumulation))
    flops = {
        bucket: step_flops(shape, num_tokens(bucket), rank=rank, adapted=adapted).model
        for bucket in buckets
    }
    of_condition = shape.num_text_tokens + shape.num_image_tokens
    rows = {bucket: num_tokens(bucket) + of_condition for bucket in buckets}
    largest = max(buckets, key=num_tokens)
    sizes = {}
    for bucket in buckets:
        micro_batch, times = _closest(
            batch_size * flops[largest] / flops[bucket],
            most=batch_size * rows[largest] // rows[bucket],
        )
        sizes[bucket] = BatchSize(micro_batch, times * accumulation)
    return sizes


def _closest(wanted: float, *, most: int) -> tuple[int, int]:
    """Split a number of clips into equal micro-batches: nearly full ones, of at most `most` clips.

    Equal, because compiled blocks hold for one shape.
    """
    fewest = max(1, int(wanted / most))
    choices = [(max(1, min(most, round(wanted / times))), times) for times in (fewest, fewest + 1)]
    return min(choices, key=lambda choice: abs(choice[0] * choice[1] - wanted))
