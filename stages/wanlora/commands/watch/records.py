"""Parse the records of a run; damaged lines are counted, not fatal.

Owns: which rows are usable. Must not know: files, or what is drawn.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from wanlora.report.series import KEYS

Row = Mapping[str, Any]

MAX_NUMBER = 1e100
"""Larger numbers are damage; the sums, ratios and scales of a page stay finite below it."""
MIN_BASE_LOSS = 1e-30
MAX_TIME = 253_402_300_799
"""End of the year 9999 in s since 1970; later times have no date."""


class Rows(NamedTuple):
    """Rows of metrics.jsonl or validation.jsonl, and the number of damaged lines."""

    rows: list[dict[str, Any]]
    num_damaged: int


def metrics_rows(data: bytes) -> Rows:
    """Parse metrics.jsonl. A last line without an end is being written and is left out."""
    return _rows(data, _is_metrics)


def validation_rows(data: bytes) -> Rows:
    """Parse validation.jsonl, like `metrics_rows`."""
    return _rows(data, _is_validation)


def last_metrics(tail: bytes) -> dict[str, Any] | None:
    """Return the newest usable row in the end of metrics.jsonl, whose first line may be cut."""
    for line in reversed(tail[: tail.rfind(b"\n") + 1].splitlines()):
        row = _parse(line)
        if row is not None and _is_metrics(row):
            return row
    return None


def settings(data: bytes | None) -> dict[str, Any]:
    """Parse config.toml; empty if it is missing or damaged."""
    try:
        return tomllib.loads((data or b"").decode())
    except (ValueError, RecursionError):
        return {}


def status(data: bytes | None) -> dict[str, Any] | None:
    """Parse status.json; None if it is missing, damaged, or of a later version."""
    found = _parse(data or b"")
    if found is None or found.get("version") != 1 or not isinstance(found.get("state"), str):
        return None
    numbers, times = ("steps_done", "steps_planned"), ("started_at", "written_at")
    is_usable = all(is_number(found.get(key)) for key in (*numbers, *times)) and all(
        0 <= found[key] <= MAX_TIME for key in times
    )
    return found if is_usable else None


def preview_prompt(head: bytes) -> str | None:
    """Read the prompt from the header of a preview's safetensors file (8 bytes length, JSON)."""
    size = int.from_bytes(head[:8], "little")
    header = _parse(head[8 : 8 + size]) if 8 + size <= len(head) else None
    about = (header or {}).get("__metadata__")
    prompt = about.get("wanlora.prompt") if isinstance(about, dict) else None
    return prompt if isinstance(prompt, str) else None


def best_held_out(validations: Sequence[Row]) -> Row | None:
    """Return the row with the lowest held-out loss, among those of the clips measured last."""
    held_out = [row for row in validations if row["split"] == "val"]
    same = [row for row in held_out if row.get("panel") == held_out[-1].get("panel")]
    return min(same, key=lambda row: float(row["mean"]), default=None)


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a number of at most `MAX_NUMBER`; NaN is not."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER
    )


def _rows(data: bytes, is_usable: Any) -> Rows:
    lines = [line for line in data[: data.rfind(b"\n") + 1].splitlines() if line.strip()]
    rows = [row for row in map(_parse, lines) if row is not None and is_usable(row)]
    return Rows(rows, len(lines) - len(rows))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_metrics(row: Row) -> bool:
    """Return whether it has a step, and a number or nothing for each of the others."""
    return _is_step(row) and all(
        row.get(key) is None or is_number(row[key]) for key in (*KEYS, "eta_s")
    )


def _is_validation(row: Row) -> bool:
    ends = row.get("ci95")
    sigmas, activities = row.get("per_sigma"), row.get("per_activity")
    return (
        _is_step(row)
        and isinstance(row.get("split"), str)
        and all(is_number(row.get(key)) for key in ("mean", "base_mean", "difference", "num_clips"))
        and row["base_mean"] >= MIN_BASE_LOSS
        and isinstance(row.get("panel"), str | None)
        and (row.get("num_groups") is None or is_number(row["num_groups"]))
        and (ends is None or _are_numbers(ends, 2))
        and isinstance(sigmas, list)
        and all(_are_numbers(each, 3) for each in sigmas)
        and isinstance(activities, dict)
        and all(_are_numbers(each, 2) and each[1] > 0 for each in activities.values())
    )


def _is_step(row: Row) -> bool:
    step = row.get("step")
    return isinstance(step, int) and is_number(step) and step >= 0


def _are_numbers(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(map(is_number, value))
