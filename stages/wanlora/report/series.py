"""Columns of numbers by step: a run's metrics, for curves of a fixed number of points.

Owns: which columns of metrics.jsonl are kept, and how a long column is reduced. Memory is 8 bytes
per value; a curve of 100,000 steps takes about a millisecond.
Must not know: files, or how a curve is drawn.
"""

import math
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64

from wanlora.report.chart import Point, extremes

KEYS = (
    "loss", "loss_smoothed", "lr", "grad_norm", "clips_per_s", "s_per_step", "data_wait_pct",
    "mfu", "tflops", "peak_memory_gb",
)  # fmt: skip
TREND_POINTS = 60


class Metrics:
    """Rows of metrics.jsonl, added as they are written.

    Attributes:
        last: The newest row; empty before the first.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.last: Mapping[str, Any] = {}
        self._steps = array("d")
        self._columns = {key: array("d") for key in KEYS}
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row of a later step; a value that is absent or not finite leaves a gap."""
        self.last = row
        self._steps.append(row["step"])
        for key, column in self._columns.items():
            value = row.get(key)
            column.append(math.nan if value is None else value)

    def curve(self, key: str) -> list[Point]:
        """Points of a column, reduced by `chart.extremes`."""
        steps, values = self._finite(key)
        kept = extremes(values)
        return list(zip(steps[kept].tolist(), values[kept].tolist(), strict=True))

    def trend(self, key: str, num: int = TREND_POINTS) -> list[Point]:
        """Means of `num` equal shares, at the middle of their steps; none of a short column."""
        steps, values = self._finite(key)
        if len(values) <= 2 * num:
            return []
        edges = np.linspace(0, len(values), num + 1).astype(int)
        means = np.add.reduceat(values, edges[:-1]) / np.diff(edges)
        middles = (steps[edges[:-1]] + steps[edges[1:] - 1]) / 2
        return list(zip(middles.tolist(), means.tolist(), strict=True))

    def median(self, key: str, last: int = 200) -> float | None:
        """Median of the last values of a column; None without any."""
        values = self._finite(key)[1][-last:]
        return float(np.median(values)) if len(values) else None

    def _finite(self, key: str) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
        steps, values = np.array(self._steps), np.array(self._columns[key])
        known = np.isfinite(values)
        return steps[known], values[known]
