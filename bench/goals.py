"""Goals of one H100 80 GB, and what a run of `gpu_proof.py` found: `python bench/goals.py`.

Owns: the goals, each written once. Printed without a file, they stand beside the predictions of
`wanlora estimate`; with the JSON of a proof, beside its figures.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

LARGE, SMALL = "81x480x832", "81x480x480"


@dataclass(frozen=True)
class Goal:
    """A figure to reach.

    Attributes:
        name: What is measured.
        unit: Unit of the numbers.
        must: Value below which the work is not done.
        target: Value to aim at; None without one.
        stretch: Best value thought possible; None without one.
        find: Takes the figure from the phases of a proof; None if it was not measured.
        higher: True if more is better.
    """

    name: str
    unit: str
    must: float
    target: float | None
    stretch: float | None
    find: Callable[[dict], float | None]
    higher: bool = False

    def reaches(self, found: float, limit: float | None) -> bool:
        if limit is None:
            return False
        return found >= limit if self.higher else found <= limit

    def verdict(self, found: float | None) -> str:
        """`stretch`, `target` or `must`, the best that is reached; `missed`, or `not measured`."""
        if found is None:
            return "not measured"
        for level in ("stretch", "target", "must"):
            if self.reaches(found, getattr(self, level)):
                return level
        return "missed"


def of_step(
    geometry: str, variants: tuple[str, ...], figure: str
) -> Callable[[dict], float | None]:
    """Take a figure of the first of some variants that was measured."""

    def find(phases: dict) -> float | None:
        for case in results(phases, "step").get("cases", []):
            rows = {row["variant"]: row for row in case["rows"] if "seconds" in row}
            for name in variants if case["geometry"] == geometry else ():
                if name in rows:
                    return rows[name].get(figure)
        return None

    return find


def of_encoders(name: str, figure: str) -> Callable[[dict], float | None]:
    def find(phases: dict) -> float | None:
        return results(phases, "encoders").get(name, {}).get(figure)

    return find


def results(phases: dict, name: str) -> dict:
    """Figures of a phase, also of one that was cut off."""
    return phases.get(name, {}).get("results") or {}


def percent(find: Callable[[dict], float | None]) -> Callable[[dict], float | None]:
    def found(phases: dict) -> float | None:
        value = find(phases)
        return None if value is None else 100 * value

    return found


FASTEST = ("auto", "none")
GOALS = (
    Goal(f"step, {LARGE}", "s", 1.90, 1.70, 1.60, of_step(LARGE, FASTEST, "seconds")),
    Goal(
        "MFU, recomputation not counted", "%", 46, 52, 55,
        percent(of_step(LARGE, FASTEST, "mfu")), higher=True,
    ),
    Goal("peak memory, fastest mode", "GB", 75, 68, None, of_step(LARGE, FASTEST, "peak_gb")),
    Goal("peak memory, selective", "GB", 20, 17, None, of_step(LARGE, ("selective",), "peak_gb")),
    Goal("step, selective", "s", 1.95, None, None, of_step(LARGE, ("selective",), "seconds")),
    Goal(
        "times faster than the one-stage loop (seed)", "×", 2.7, 3.2, 3.5,
        of_step(LARGE, FASTEST, "seed takes"), higher=True,
    ),
    Goal(
        "than full checkpointing, default attention (fullckpt)", "×", 1.7, 2.1, None,
        of_step(LARGE, FASTEST, "fullckpt takes"), higher=True,
    ),
    Goal(
        "than the same with cuDNN (fullckpt_cudnn)", "×", 1.3, 1.5, None,
        of_step(LARGE, FASTEST, "fullckpt_cudnn takes"), higher=True,
    ),
    Goal(f"step, {SMALL}", "s", 0.85, 0.70, None, of_step(SMALL, FASTEST, "seconds")),
    Goal("stage one per clip, float32 with TF32", "s", 1.2, 0.7, None,
         of_encoders("vae float32+tf32 eager", "seconds")),
    Goal("encoder waits for .npz clips", "%", 5, None, None,
         percent(of_encoders("wait npz", "stall_after_it"))),
    Goal("encoder waits for videos", "%", 5, None, None,
         percent(of_encoders("wait video", "stall_after_it"))),
)  # fmt: skip


def predictions() -> dict:
    """Phases of a proof as they are predicted for an H100, from published rates."""
    from wanlora.adapters import targets  # noqa: PLC0415  (the table of a proof needs no torch)
    from wanlora.core.buckets import Bucket  # noqa: PLC0415
    from wanlora.cost.gpus import GPUS  # noqa: PLC0415
    from wanlora.cost.memory import step_bytes  # noqa: PLC0415
    from wanlora.cost.seconds import encode_seconds, model_flops, predict_seconds  # noqa: PLC0415
    from wanlora.training.workload import workload  # noqa: PLC0415
    from wanlora.wan.variants import VARIANTS  # noqa: PLC0415

    row, gpu = VARIANTS["t2v-1.3b"], GPUS["H100"]
    # FlashAttention-2, torch's own choice, reaches 373 and 320 TFLOP/s (docs/performance.md).
    flash = replace(gpu, attention_forward=373 / 989.4, attention_backward=320 / 989.4)
    names = targets.match_targets(targets.linear_names(row.shape.num_layers), "attention")
    vae = encode_seconds(81, 480, 832, gpu)
    cases = []
    for bucket in (Bucket(81, 480, 832), Bucket(81, 480, 480)):
        compiled, eager = (
            workload(row, bucket, batch_size=1, rank=32, adapted=names, compiled=each,
                     element_bytes=2)
            for each in (True, False)
        )  # fmt: skip

        def seconds(work, mode, card):
            return predict_seconds(work, (mode,) * row.shape.num_layers, card).total

        def peak(mode, work=compiled):
            return step_bytes(work, (mode,) * row.shape.num_layers).total / 1e9

        best = seconds(compiled, "none", gpu)
        fast = {
            "variant": "none", "seconds": best, "peak_gb": peak("none"),
            "mfu": model_flops(compiled) / best / gpu.peak_flops,
            "seed takes": (seconds(eager, "full", flash) + vae) / best,
            "fullckpt takes": seconds(eager, "full", flash) / best,
            "fullckpt_cudnn takes": seconds(eager, "full", gpu) / best,
        }  # fmt: skip
        slow = {
            "variant": "selective", "seconds": seconds(compiled, "selective", gpu),
            "peak_gb": peak("selective"),
        }  # fmt: skip
        cases.append({"geometry": str(bucket), "rows": [fast, slow]})
    return {
        "step": {"results": {"cases": cases}},
        "encoders": {"results": {"vae float32+tf32 eager": {"seconds": vae}}},
    }


def verdicts(phases: dict) -> list[dict]:
    """One row per goal, with the figure that was found and the best level that it reaches."""
    rows = []
    for goal in GOALS:
        found = goal.find(phases)
        rows.append(
            {"goal": goal.name, "unit": goal.unit, "must": goal.must, "target": goal.target,
             "stretch": goal.stretch, "found": found, "verdict": goal.verdict(found)}
        )  # fmt: skip
    return rows


def table(rows: list[dict], found: str = "found") -> str:
    """Write verdicts as Markdown.

    Args:
        rows: From `verdicts`.
        found: Title of the column of figures.
    """

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}"

    lines = [f"| goal | must | target | stretch | {found} | reached |", "|---|---|---|---|---|---|"]
    for row in rows:
        unit = row["unit"]
        limits = (number(row[level]) for level in ("must", "target", "stretch"))
        reached = "**missed**" if row["verdict"] == "missed" else row["verdict"]
        value = "–" if row["found"] is None else f"{number(row['found'])} {unit}"
        lines.append(f"| {row['goal']}, {unit} | {' | '.join(limits)} | {value} | {reached} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("proof", type=Path, nargs="?", help="gpu_proof.json")
    options = parser.parse_args()
    if options.proof:
        print(table(verdicts(json.loads(options.proof.read_text())["phases"])))
    else:
        print(table(verdicts(predictions()), "predicted"))


if __name__ == "__main__":
    main()
