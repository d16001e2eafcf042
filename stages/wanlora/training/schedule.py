"""Learning-rate multipliers by step, for torch's LambdaLR, and the length of a run.

Owns: warm-up, decay, and the number of steps under which a run learns nothing. Multipliers are in
[0, 1] and apply to the peak learning rate.
"""

import math
from collections.abc import Callable
from fractions import Fraction

from wanlora.core.units import count
from wanlora.training.order import num_steps as steps_of

MAX_WARMUP_STEPS = 100
MIN_STEPS = 100
"""Adam moves a weight by about the learning rate per step. 100 steps at 1e-4 move it by at most
0.01, which is small against the trained values of `lora_B`."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _progress: 1.0,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
}


def multiplier(step: int, *, schedule: str, warmup_steps: int, num_steps: int) -> float:
    """Multiplier of the optimizer step `step`, counted from 0.

    Warm-up is (step + 1) / (warmup_steps + 1), so that the first step already learns; then the
    schedule over what is left, reaching its end at num_steps.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return SCHEDULES[schedule](min(1.0, progress))


def default_warmup(num_steps: int) -> int:
    """Steps of warm-up of a run that sets none: a tenth of the run, at most 100."""
    return min(MAX_WARMUP_STEPS, num_steps // 10)


def describe_short_run(
    num_steps: int,
    *,
    steps_per_epoch: Fraction,
    draws_per_epoch: Fraction,
    num_epochs: float | None,
    accumulation: int,
    num_processes: int,
) -> str | None:
    """Warning about a run of fewer than `MIN_STEPS` steps, with settings that make it longer.

    Args:
        num_steps: Optimizer steps of the run.
        steps_per_epoch: Optimizer steps that draw each clip once.
        draws_per_epoch: Clips drawn per epoch.
        num_epochs: Epochs of the run; None if its number of steps was given.
        accumulation: Micro-batches per optimizer step, over all processes.
        num_processes: Processes; `accumulation` is a multiple of it.
    """
    if num_steps >= MIN_STEPS:
        return None
    epochs = math.ceil(MIN_STEPS / steps_per_epoch)
    text = (
        f"a run of {count(num_steps, 'optimizer step')} shows that training works, and is too "
        f"short to learn from (expected at least {MIN_STEPS}). An epoch has "
        f"{float(draws_per_epoch):g} clips, {float(draws_per_epoch / steps_per_epoch):g} per step. "
        f"Use --max-steps {MIN_STEPS} or more (--num-epochs {epochs} or more)"
    )
    if num_epochs is None or accumulation <= num_processes:
        return text
    more = steps_of(steps_per_epoch * accumulation / num_processes, num_epochs=num_epochs)
    return (
        f"{text}, or --gradient-accumulation-steps {num_processes}, which makes {more:,} steps of "
        f"the same {num_epochs:g} epochs"
    )
