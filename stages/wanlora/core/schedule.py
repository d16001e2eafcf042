"""Learning-rate multipliers by step, for torch's LambdaLR.

Owns: warm-up and decay. Multipliers are in [0, 1] and apply to the peak learning rate.
"""

import math
from collections.abc import Callable

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
