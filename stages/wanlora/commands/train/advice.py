"""Warnings about a run, from its metrics and validations, each with the way to avoid it.

Owns: the choice of rows of metrics.jsonl and validation.jsonl that are compared. Must not know:
how they are measured or written.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from wanlora.runs.checkpoints import Progress
from wanlora.training import schedule
from wanlora.training.validation import ADAPTER

logger = logging.getLogger(__name__)

OVERFIT_VALIDATIONS = 2
RATE_JUMP = 0.01
"""Change of the learning rate, as a share of its peak, that no schedule makes in one step."""

Row = Mapping[str, Any]


def last_held_out(rows: Iterable[Row]) -> dict[str, Any] | None:
    """Last row of validation.jsonl for the newest adapter on held-out clips."""
    found = [row for row in rows if (row["split"], row.get("weights", ADAPTER)) == ("val", ADAPTER)]
    return dict(found[-1]) if found else None


def best_held_out(rows: Iterable[Row], progress: Progress) -> dict[str, Any] | None:
    """Row of validation.jsonl for the adapter in `best/`."""
    wanted = ("val", progress.best_step, progress.best_weights, progress.panel)
    keys = ("split", "step", "weights", "panel")
    found = [row for row in rows if tuple(row.get(key) for key in keys) == wanted]
    return dict(found[-1]) if found else None


def warn_of_overfitting(
    rows: Sequence[Row], panel_keys: Mapping[str, str], *, best_step: int | None
) -> None:
    """Warn if training clips still improve while held-out ones got worse, twice in a row.

    Args:
        rows: Rows of validation.jsonl.
        panel_keys: Key of each panel by split; losses on other panels do not count.
        best_step: Step of the adapter in `best/`.
    """
    recent = [
        [
            float(row["mean"])
            for row in rows
            if split in panel_keys
            and row.get("panel") == panel_keys[split]
            and row["weights"] == ADAPTER
        ][-OVERFIT_VALIDATIONS - 1 :]
        for split in ("train", "val")
    ]
    if min(map(len, recent)) <= OVERFIT_VALIDATIONS:
        return
    training, held_out = recent
    if _falls(training) and _falls(held_out[::-1]):
        logger.warning(
            "overfitting: the loss on training clips falls while that on held-out clips rises; "
            "the best adapter so far is that of step %s, in best/",
            best_step,
        )


def warn_of_worse_than_base(final: Row | None, best: Row | None, *, rate: float) -> None:
    """Warn if the newest adapter is worse than the base model without it.

    Args:
        final: Its last row of validation.jsonl, on held-out clips.
        best: The row of the adapter in `best/`.
        rate: Peak learning rate.
    """
    if final is None or final["difference"] <= 0:
        return
    if best is not None and best["difference"] < 0:
        advice = f"Use best/ instead: {_figures(best)}"
    else:
        advice = (
            "No adapter of this run is better than the base. Train again in another --output-dir "
            f"with a lower --learning-rate (this run: {rate:g}), fewer steps or more clips"
        )
    logger.warning(
        "the adapter is worse than the base model without it: %s. %s", _figures(final), advice
    )


def warn_of_rate_jump(
    schedule_name: str, rate: float, last: Row, *, warmup_steps: int, end_step: int
) -> None:
    """Warn if a run that continues has another learning rate than when it stopped.

    With more steps, a schedule that decays to the last step has another rate at every step.

    Args:
        schedule_name: Name of the schedule.
        rate: Peak learning rate.
        last: Last row of metrics.jsonl.
        warmup_steps: Steps of warm-up.
        end_step: Steps of the run now.
    """
    now = rate * schedule.multiplier(
        last["step"],
        schedule=schedule_name,
        warmup_steps=warmup_steps,
        num_steps=end_step,
    )
    if abs(now - last["lr"]) > RATE_JUMP * rate:
        logger.warning(
            "the learning rate jumps from %.4g to %.4g: the %s schedule now ends at step %d. To "
            "avoid this, keep the number of steps, or train further in another --output-dir with "
            "--init-adapter and its own schedule; for a run that will be extended, start it "
            "with --set optimizer.schedule=constant",
            last["lr"], now, schedule_name, end_step,
        )  # fmt: skip


def _figures(row: Row) -> str:
    change = 100 * row["difference"] / row["base_mean"]
    return (
        f"step {row['step']}, held-out loss {row['mean']:.4f}, base {row['base_mean']:.4f} "
        f"({change:+.2f} %)"
    )


def _falls(values: list[float]) -> bool:
    return all(later < earlier for earlier, later in pairwise(values))
