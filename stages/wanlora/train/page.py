"""`run.html`: a run's files to its page. Can be written at any time, of any run.

Owns: which files are read. What is drawn is in `report.run_page`.
"""

import tomllib
from pathlib import Path

from wanlora import runs
from wanlora.files import write_text
from wanlora.report.run_page import Preview, run_page
from wanlora.wan.saved_latents import read_latents

PAGE_NAME = "run.html"
MOST_PREVIEWED_STEPS = 8


def write_page(run_dir: Path) -> Path:
    """Write a run's page from what lies in its folder, and return its path."""
    config = run_dir / runs.CONFIG_NAME
    folders = sorted((run_dir / runs.PREVIEWS_NAME).glob("step-[0-9]*"))
    shown = spread(folders, MOST_PREVIEWED_STEPS)
    left_out = len(folders) - len(shown)
    html = run_page(
        run_dir.name,
        settings=tomllib.loads(config.read_text(encoding="utf-8")) if config.exists() else {},
        metrics=runs.read_rows(run_dir, runs.METRICS_NAME),
        validations=runs.read_rows(run_dir, runs.VALIDATION_NAME),
        previews=[preview for folder in shown for preview in _previews(folder)],
        note=f"{left_out} of {len(folders)} steps are not shown here; see {runs.PREVIEWS_NAME}/."
        if left_out
        else "",
    )
    path = run_dir / PAGE_NAME
    write_text(path, html)
    return path


def spread(items: list[Path], most: int) -> list[Path]:
    """Choose at most `most` items evenly, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _previews(folder: Path) -> list[Preview]:
    """Pictures of one step; a preview without one (no projection in the store) has none."""
    step = int(folder.name.removeprefix("step-"))
    return [
        Preview(
            step, read_latents(gif.with_suffix(".safetensors")).facts["prompt"], gif.read_bytes()
        )
        for gif in sorted(folder.glob("*.gif"))
    ]
