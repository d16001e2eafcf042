"""Clips, model, card and batch sizes of an estimate, and the seconds that follow from them.

Owns: means over steps of different buckets, and the seconds of a micro-batch and of a forward pass,
predicted or scaled by a probe. Must not know: settings, torch.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

from wanlora.commands.estimate.card import Card
from wanlora.core.buckets import Bucket, num_tokens
from wanlora.core.location import Location
from wanlora.cost.memory import Workload
from wanlora.cost.seconds import (
    Seconds,
    forward_flops,
    model_flops,
    predict_forward_seconds,
    predict_seconds,
)
from wanlora.cost.streaming import predict_streaming
from wanlora.store.views import View
from wanlora.training.batch_sizes import BatchSize
from wanlora.training.order import Order, num_steps
from wanlora.training.workload import Modes, Trial, largest
from wanlora.wan.variants import Expert, Variant


@dataclass(frozen=True, slots=True)
class Case:
    """Clips, model, card and batch sizes of an estimate.

    Attributes:
        cache: The cache; None = only numbers of clips are given.
        view: The cache's view.
        variant: Variant of the model.
        buckets: Number of clips to train on, by bucket.
        to_encode: Number of all clips, by bucket.
        card: Device of the run.
        sizes: Clips of a step, by bucket.
        works: Micro-batch, by bucket.
        order: The run's order, with the default seed.
        num_epochs: Epochs of the run.
        num_processes: Processes that share the global batch.
        expert: Transformer of a model with two; None = either.
        trial: Result of the probe, if there was one.
    """

    cache: Location | None
    view: View | None
    variant: Variant
    buckets: Counter[Bucket]
    to_encode: Counter[Bucket]
    card: Card
    sizes: dict[Bucket, BatchSize]
    works: dict[Bucket, Workload]
    order: Order
    num_epochs: float
    num_processes: int
    expert: Expert | None = None
    trial: Trial | None = None

    @property
    def largest(self) -> Bucket:
        """Bucket of the micro-batch that takes the most memory."""
        return largest(self.works)

    @property
    def work(self) -> Workload:
        """The micro-batch that takes the most memory."""
        return self.works[self.largest]

    @property
    def is_timed(self) -> bool:
        """True if the card's rates are known or a probe measured them."""
        return self.card.gpu is not None or self.trial is not None

    @property
    def steps_per_epoch(self) -> Fraction:
        """Steps that train every clip as often as its weight."""
        return self.order.steps_per_epoch

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return num_steps(self.steps_per_epoch, num_epochs=self.num_epochs)

    def in_a_step(self, bucket: Bucket, cost: Callable[[Workload], float]) -> float:
        """Sum a cost over the micro-batches that a process has in a step of a bucket."""
        share = self.sizes[bucket].num_micro_batches // self.num_processes
        return share * cost(self.works[bucket])

    def mean(self, cost: Callable[[Workload], float]) -> float:
        """Mean over steps of the sum of a cost over a process's micro-batches."""
        total = sum(
            float(steps) * self.in_a_step(bucket, cost)
            for bucket, steps in self.order.bucket_steps_per_epoch.items()
        )
        return total / float(self.steps_per_epoch)

    def pace(self, modes: Modes) -> Callable[[Workload], Seconds] | None:
        """Return a function from a micro-batch to its seconds; None if they are not known."""
        gpu, trial = self.card.gpu, self.trial
        if gpu is None:
            if trial is None or modes != trial.modes:
                return None
            seconds_per_flop = trial.seconds / model_flops(self.work)
            return lambda work: Seconds(0.0, seconds_per_flop * model_flops(work), 0.0)

        def seconds(work: Workload) -> Seconds:
            found = predict_seconds(work, modes, gpu).times(self.scale)
            return replace(found, copies=predict_streaming(work, modes, gpu).exposed_s)

        return seconds

    @property
    def scale(self) -> float:
        """Measured over predicted seconds of the micro-batch that was probed."""
        if self.trial is None or self.card.gpu is None:
            return 1.0
        predicted = predict_seconds(self.work, self.trial.modes, self.card.gpu)
        return self.trial.seconds / predicted.total

    def forward_seconds(self, bucket: Bucket) -> float:
        """Seconds of a forward pass of one clip without gradients."""
        work = self.works.get(bucket) or replace(self.work, num_tokens=num_tokens(bucket))
        if self.card.gpu:
            return self.scale * predict_forward_seconds(work, self.card.gpu).total
        assert self.trial, "the case is timed"
        return self.trial.seconds / model_flops(self.work) * forward_flops(work)

    def seconds(self, modes: Modes) -> Seconds | None:
        """Seconds of a mean step; for a probed card with unknown rates only the total counts."""
        pace = self.pace(modes)
        if pace is None:
            return None
        return Seconds(
            self.mean(lambda work: pace(work).attention),
            self.mean(lambda work: pace(work).matmul),
            self.mean(lambda work: pace(work).elementwise),
            self.mean(lambda work: pace(work).copies),
        )
