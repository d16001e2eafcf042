"""What a step was expected to take, beside what it took.

Owns: the sentence at the end of a run.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from wanlora.core.buckets import Bucket, num_tokens
from wanlora.core.cost import model_flops, predict_seconds
from wanlora.core.gpus import gpu_of
from wanlora.core.memory import Workload
from wanlora.step.trial import Trial


def against_prediction(
    seconds: Sequence[float],
    buckets: Sequence[Bucket],
    *,
    work: Workload,
    trial: Trial,
    num_micro_batches: int,
    device_name: str,
) -> str | None:
    """Compare a run's median step with its prediction; None for a run of no steps.

    Args:
        seconds: Of each step.
        buckets: Of each step.
        work: The micro-batch that was tried.
        trial: What it took.
        num_micro_batches: Of a step, in this process.
        device_name: See `gpu_of`; a card that is not known has no prediction of its own.
    """
    if not seconds:
        return None
    works = [replace(work, num_tokens=num_tokens(bucket)) for bucket in buckets]
    gpu = gpu_of(device_name)
    parts = []
    if gpu:
        predicted = median(predict_seconds(item, trial.modes, gpu).total for item in works)
        parts.append(f"{num_micro_batches * predicted:.3g} predicted for {device_name}")
    tried = median(trial.seconds * model_flops(item) / model_flops(work) for item in works)
    parts.append(f"{num_micro_batches * tried:.3g} by the trial")
    return f"seconds a step: {', '.join(parts)}, {median(seconds):.3g} taken (medians)"
