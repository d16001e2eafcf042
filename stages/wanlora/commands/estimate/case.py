"""Settings, clips and card of an estimate, and the seconds that follow from them.

Owns: means over steps of different buckets, and the pace of a micro-batch and of a forward pass,
predicted or scaled by a probe.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

from wanlora.config import EstimateConfig
from wanlora.core.buckets import Bucket, num_tokens
from wanlora.cost.gpus import Gpu
from wanlora.cost.memory import Workload
from wanlora.cost.seconds import (
    Seconds,
    forward_flops,
    model_flops,
    predict_forward_seconds,
    predict_seconds,
)
from wanlora.store.views import View
from wanlora.training.batch_sizes import BatchSize
from wanlora.training.order import Order, num_steps
from wanlora.training.workload import Modes, Trial, largest
from wanlora.wan.variants import Variant


@dataclass(frozen=True, slots=True)
class Card:
    """Device of the run.

    Attributes:
        gpu: Its rates; None if they are not known.
        device: Its name in torch, such as `cuda:1`.
        limit_bytes: Memory that a step may take.
        element_bytes: Bytes of a value of the transformer.
    """

    name: str
    gpu: Gpu | None
    device: str
    limit_bytes: float
    element_bytes: int = 2

    @property
    def device_type(self) -> str:
        """`cuda`, `cpu` or `mps`."""
        return self.device.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Case:
    """Settings, clips and device of an estimate.

    Attributes:
        view: The cache's view, if a cache was given.
        buckets: Number of clips to train on, by bucket.
        to_encode: Number of all clips, by bucket.
        sizes: Clips of a step, by bucket.
        works: Micro-batch, by bucket.
        order: The run's order, with the default seed.
        trial: Result of the probe, if there was one.
    """

    config: EstimateConfig
    view: View | None
    variant: Variant
    buckets: Counter[Bucket]
    to_encode: Counter[Bucket]
    card: Card
    sizes: dict[Bucket, BatchSize]
    works: dict[Bucket, Workload]
    order: Order
    trial: Trial | None

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
        """Whether the device's rates are known or were measured."""
        return self.card.gpu is not None or self.trial is not None

    @property
    def steps_per_epoch(self) -> Fraction:
        """Steps that train every clip as often as its weight."""
        return self.order.steps_per_epoch

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return num_steps(self.steps_per_epoch, num_epochs=self.config.num_epochs)

    def in_a_step(self, bucket: Bucket, of: Callable[[Workload], float]) -> float:
        """What a process's micro-batches of a bucket's step add up to."""
        share = self.sizes[bucket].num_micro_batches // self.config.num_processes
        return share * of(self.works[bucket])

    def mean(self, of: Callable[[Workload], float]) -> float:
        """Mean over steps of what a process's micro-batches add up to."""
        total = sum(
            float(steps) * self.in_a_step(bucket, of)
            for bucket, steps in self.order.bucket_steps_per_epoch.items()
        )
        return total / float(self.steps_per_epoch)

    def pace(self, modes: Modes) -> Callable[[Workload], Seconds] | None:
        """Give the seconds of a micro-batch as a function; None where nothing is known."""
        gpu, trial, tried = self.card.gpu, self.trial, self.work
        if gpu is None:
            if trial is None or modes != trial.modes:
                return None
            a_flop = trial.seconds / model_flops(tried)
            return lambda work: Seconds(0.0, a_flop * model_flops(work), 0.0)
        return lambda work: predict_seconds(work, modes, gpu).times(self.scale)

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
        """Seconds of a mean step; of a probed device of unknown rates only the total."""
        pace = self.pace(modes)
        if pace is None:
            return None
        return Seconds(
            self.mean(lambda work: pace(work).attention),
            self.mean(lambda work: pace(work).matmul),
            self.mean(lambda work: pace(work).elementwise),
        )
