"""What a step was expected to take, beside what it took.

Owns: the sentence at the end of a run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from wanlora.core.buckets import Bucket, num_tokens
from wanlora.core.cost import model_flops, predict_seconds
from wanlora.core.gpus import gpu_of
from wanlora.core.memory import Workload
from wanlora.step.workload import Trial


def against_prediction(
    seconds: Sequence[float],
    buckets: Sequence[Bucket],
    *,
    work: Workload,
    trial: Trial,
    slots: Mapping[Bucket, Sequence[Sequence[int]]],
    device_name: str,
) -> str | None:
    """Compare a run's median step with its prediction; None for a run of no steps.

    Args:
        seconds: Of each step.
        buckets: Of each step.
        work: The micro-batch that was tried.
        trial: What it took.
        slots: This process's of a step of each bucket, by micro-batch.
        device_name: See `gpu_of`; a card that is not known has no prediction of its own.
    """
    if not seconds:
        return None
    works = {
        bucket: replace(
            work, num_tokens=num_tokens(bucket), batch_size=sum(map(len, slots[bucket]))
        )
        for bucket in set(buckets)
    }
    gpu, parts = gpu_of(device_name), []
    if gpu:
        predicted = {b: predict_seconds(w, trial.modes, gpu).total for b, w in works.items()}
        middle = median(predicted[bucket] for bucket in buckets)
        parts.append(f"{middle:.3g} predicted for {device_name}")
    a_flop = trial.seconds / model_flops(work)
    tried = {bucket: a_flop * model_flops(item) for bucket, item in works.items()}
    middle = median(tried[bucket] for bucket in buckets)
    parts.append(f"{middle:.3g} by the trial")
    return f"seconds a step: {', '.join(parts)}, {median(seconds):.3g} taken (medians)"
