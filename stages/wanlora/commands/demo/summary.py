"""Last step of the demo: measurements that no command makes, and the report.

Owns: this step, the only one that computes in the demo's own process.
"""

import json
import logging
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from wanlora.commands.demo import measure
from wanlora.commands.demo.demo import BATCH_SIZE, NUM_CLIPS, OUTPUTS, REPORT, DemoResult
from wanlora.files import write_atomic, write_text
from wanlora.micro import world
from wanlora.report.demo_page import comparison_gif, demo_page

NUM_SHOWN = 6
"""Clips of each model in the picture."""

logger = logging.getLogger(__name__)


def summarise(root: Path, concept: str, *, seed: int) -> dict[str, Any]:
    """Generate clips with base and adapter, and write the report.

    Args:
        root: Folder of the demo.
        concept: The taught concept.
        seed: Seed of the demo.

    Returns:
        The measurements: fields of `DemoResult`.
    """
    logger.info("\nclips of base and adapter, for the same prompts and noise")
    scenes = measure.scenes(concept, NUM_CLIPS, seed=seed)
    base = measure.make_clips(scenes, None, seed=seed)
    adapter = measure.make_clips(scenes, root / "run", seed=seed)
    inspected = _inspect(root / "cache")
    cached_s = _seconds_per_step(root / "run" / "metrics.jsonl")
    encoding_s = measure.encoding_seconds(root / "data" / "train.jsonl")
    values = {
        "concept": concept,
        "held_out": _held_out(root / "run" / "validation.jsonl"),
        "base_share": base.share(concept),
        "adapter_share": adapter.share(concept),
        "clips": inspected["clips"],
        "raw_bytes": inspected["clips"] * world.NUM_FRAMES * world.SIZE_PX**2 * 3,
        "cache_bytes": inspected["bytes"],
        "cached_s": cached_s,
        "one_stage_s": cached_s + BATCH_SIZE * encoding_s,
    }
    result = DemoResult(**values, adapter=str(root / OUTPUTS["train"]), report=str(root / REPORT))
    shown = (made.clips[:NUM_SHOWN] for made in (base, adapter))
    gif = comparison_gif(*shown, fps=world.FPS)
    write_atomic(root / "comparison.gif", gif)
    recognised = [
        [scene.caption, *(f"{one.concept or 'nothing'} ({one.match:.2f})" for one in pair)]
        for scene, pair in zip(scenes, zip(base.seen, adapter.seen, strict=True), strict=True)
    ]
    page = demo_page(concept, gif, recognised, figures=result.figures(), files=_FILES)
    write_text(root / REPORT, page)
    return values


_FILES = {
    "training": "run/run.html",
    "adapter": OUTPUTS["train"],
    "evaluation": OUTPUTS["evaluate"],
    "for ComfyUI": OUTPUTS["export"],
}


def _inspect(cache: Path) -> dict[str, Any]:
    done = subprocess.run(  # noqa: S603  (our own command)
        [sys.executable, "-m", "wanlora", "inspect", str(cache), "--json"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    inspected: dict[str, Any] = json.loads(done.stdout)
    return inspected


def _held_out(validations: Path) -> dict[str, Any]:
    """Last validation of the run on held-out clips."""
    rows = [json.loads(line) for line in validations.read_text().splitlines()]
    last: dict[str, Any] = [row for row in rows if row["split"] == "val"][-1]
    return last


def _seconds_per_step(metrics: Path) -> float:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return float(statistics.median(BATCH_SIZE / row["clips_per_s"] for row in rows[3:] or rows))
