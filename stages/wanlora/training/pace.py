"""Expected seconds of a step, and their comparison with the measured ones at the end of a run.

Owns: the log line with that comparison.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from wanlora.core.buckets import Bucket, num_tokens
from wanlora.core.units import duration
from wanlora.cost.gpus import gpu_of
from wanlora.cost.memory import Workload
from wanlora.cost.seconds import model_flops, predict_seconds
from wanlora.training.workload import Trial


def expected_seconds(
    work: Workload, trial: Trial, slots: Mapping[Bucket, Sequence[Sequence[int]]]
) -> dict[Bucket, float]:
    """Predict the seconds of a step of each bucket from the trial, in proportion to its FLOPs.

    Args:
        work: The micro-batch that was tried.
        trial: Its measurements.
        slots: This process's slots of a step of each bucket, by micro-batch.
    """
    a_flop = trial.seconds / model_flops(work)
    return {b: a_flop * model_flops(item) for b, item in _works(work, slots).items()}


def _works(
    work: Workload, slots: Mapping[Bucket, Sequence[Sequence[int]]]
) -> dict[Bucket, Workload]:
    return {
        bucket: replace(work, num_tokens=num_tokens(bucket), batch_size=sum(map(len, each)))
        for bucket, each in slots.items()
    }


def compare_with_prediction(
    seconds: Sequence[float],
    buckets: Sequence[Bucket],
    *,
    work: Workload,
    trial: Trial,
    slots: Mapping[Bucket, Sequence[Sequence[int]]],
    device_name: str,
) -> str | None:
    """Compare a run's median step with its prediction; None for a run without steps.

    Args:
        seconds: Seconds of each step.
        buckets: Bucket of each step.
        work: The micro-batch that was tried.
        trial: Its measurements.
        slots: This process's slots of a step of each bucket, by micro-batch.
        device_name: See `gpu_of`; without a prediction if the card is unknown.
    """
    if not seconds:
        return None
    gpu, parts = gpu_of(device_name), []
    if gpu:
        predicted = {
            bucket: predict_seconds(each, trial.modes, gpu).total
            for bucket, each in _works(work, slots).items()
        }
        middle = median(predicted[bucket] for bucket in buckets)
        parts.append(f"{duration(middle)} predicted for {device_name}")
    tried = expected_seconds(work, trial, slots)
    parts.append(f"{duration(median(tried[bucket] for bucket in buckets))} by the trial")
    return f"time per step: {', '.join(parts)}, {duration(median(seconds))} taken (medians)"
