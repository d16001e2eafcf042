"""The page of a run, from its folder, and as a browser shows it."""

import base64
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch

from wanlora.commands.train.previews import save_previews
from wanlora.core.intervals import UNDECIDED
from wanlora.report.gallery import MAX_COLUMNS
from wanlora.runs import run_folder
from wanlora.runs.page import RunFiles

CHROMIUM = shutil.which("chromium")


def write_page(run_dir):
    """Write a run's page from the files in its folder, with the state recorded last."""
    files, recorded = RunFiles(run_dir), run_dir / run_folder.STATUS_NAME
    files.read()
    status = json.loads(recorded.read_text()) if recorded.exists() else None
    path = run_dir / run_folder.PAGE_NAME
    path.write_text(files.page(status))
    return path


def write_run(folder, *, num_steps=20, preview_steps=(10, 20), validations=True):
    folder.mkdir()
    settings = {"model": "micro", "lora": {"rank": 4, "targets": "<script>alert(1)</script>"}}
    (folder / run_folder.CONFIG_NAME).write_text(tomli_w.dumps(settings))
    for step in range(num_steps):
        run_folder.append_row(
            folder, run_folder.METRICS_NAME,
            {"step": step, "loss": 1.0 / (step + 1), "loss_smoothed": 0.5, "lr": 1e-4,
             "grad_norm": 0.5, "clips_per_s": 2.0, "s_per_step": 0.5, "tflops": 0.01, "mfu": None,
             "data_wait_pct": 1.0, "peak_memory_gb": 0.5, "eta_s": 3.0},
        )  # fmt: skip
    for step, split in [(10, "val"), (10, "train"), (20, "val"), (20, "train")] * validations:
        mean = 0.4 if (step, split) == (10, "val") else 0.45
        row = {"step": step, "split": split, "mean": mean, "base_mean": 0.5,
               "difference": mean - 0.5, "standard_error": 0.01,
               "ci95": [mean - 0.52, mean - 0.48], "per_sigma": [[0.2, 0.6, 0.7], [0.8, 0.2, 0.3]],
               "per_activity": {"walking": [mean, 0.5]},
               "num_clips": 12, "num_groups": 3}  # fmt: skip
        run_folder.append_row(folder, run_folder.VALIDATION_NAME, row)
    for step in preview_steps:
        save_previews(
            folder, step, ["a <dog>", "a cat"],
            list(torch.randn(2, 16, 3, 4, 6, generator=torch.Generator().manual_seed(step))),
            np.full((17, 3), 0.1), seed=0, fps=16.0, facts={"model": "micro", "variant": "micro"},
        )  # fmt: skip
    return folder


def test_a_page_shows_curves_validation_and_previews(tmp_path):
    run = write_run(tmp_path / "clapping")
    made = write_page(run).read_text()
    assert "<title>Run clapping</title>" in made
    for title in ("Training loss", "Validation loss", "Learning rate", "Waiting for data",
                  "Achieved TFLOP/s", "95 % interval", "By noise level at step 20"):  # fmt: skip
        assert title in made, title
    assert "0.4000 at step 10 (-20.00 %" in made
    assert UNDECIDED in made  # 3 source groups
    assert re.search(r"\b12 clips .*\b3 source groups", made)
    assert "<script>alert" not in made
    assert "a &lt;dog&gt;" in made
    gifs = [base64.b64decode(data) for data in re.findall(r"image/gif;base64,([^\"]+)", made)]
    folder = run / "previews"
    wanted = [folder / f"step-{step:06d}" / f"{i:02d}.gif" for i in (0, 1) for step in (10, 20)]
    assert gifs == [path.read_bytes() for path in wanted]


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    run = write_run(tmp_path / "new", num_steps=0, preview_steps=(), validations=False)
    made = write_page(run).read_text()
    assert "none yet" in made
    assert "nothing yet" in made
    assert "Against the base model" not in made


def test_of_many_previews_some_are_shown_and_the_rest_named(tmp_path):
    steps = tuple(range(100, 1300, 100))
    made = write_page(write_run(tmp_path / "long", preview_steps=steps)).read_text()
    assert len(re.findall("image/gif", made)) == 2 * MAX_COLUMNS
    assert "4 of 12 steps" in made
    assert ">step 100<" in made
    assert ">step 1,200<" in made


def in_browser(page, tmp_path, *options):
    """Open a page, and return the JSON that its script puts into the title."""
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", *options,
            "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width_px", [1300, 390])
def test_a_browser_draws_every_chart_without_an_error(tmp_path, width_px):
    page = write_page(write_run(tmp_path / "shown"))
    probe = tmp_path / "probe.html"
    script = """<script>addEventListener("load", () => { document.title = JSON.stringify({
      charts: [...document.querySelectorAll(".chart svg")].map(s => s.getBoundingClientRect().width > 200),
      images: [...document.images].map(i => i.naturalWidth),
      outside: [...document.querySelectorAll(".chart svg text")].filter(t => { const b = t.getBoundingClientRect(),
        s = t.closest("svg").getBoundingClientRect(); return b.left < s.left - 1 || b.right > s.right + 1; }).length,
      titles: document.querySelectorAll(".strip-x title").length }); });</script>"""  # noqa: E501
    text = page.read_text().replace('loading="lazy"', "")
    probe.write_text(text.replace("</body>", f"{script}</body>"))
    found = in_browser(probe, tmp_path, f"--window-size={width_px},900")
    assert found["charts"] == [True] * 11
    assert found["images"] == [24] * 4
    assert found["outside"] == 0
    assert found["titles"] > 50


@pytest.mark.slow  # Chromium's virtual time and a page that reloads itself sometimes wait for ever
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_live_page_reloads_itself_and_stays_where_it_was_read(tmp_path):
    run = write_run(tmp_path / "live")
    status = {
        "version": 1, "state": "training", "reason": None, "steps_done": 20, "steps_planned": 40,
        "started_at": time.time(), "written_at": time.time() + 600, "next_write_s": 2,
        "eta_s": 60.0, "checkpoint": None, "warnings": ["few clips"] * 9,
    }  # fmt: skip
    (run / run_folder.STATUS_NAME).write_text(json.dumps(status))
    probe = tmp_path / "probe.html"
    script = """<script>addEventListener("load", () => { window.name = Number(window.name) + 1;
      const folded = [...document.querySelectorAll("details")];
      if (window.name === "1") { folded[1].open = true; scrollTo(0, 300); }
      document.title = JSON.stringify({ loads: Number(window.name), top: Math.round(scrollY),
        open: folded.map(d => d.open) }); });</script>"""
    probe.write_text(write_page(run).read_text().replace("</body>", f"{script}</body>"))
    found = in_browser(probe, tmp_path, "--window-size=1300,900", "--virtual-time-budget=8000")
    assert found["loads"] >= 2
    assert (found["top"], found["open"]) == (300, [False, True])


def test_a_run_of_0_1_0_has_a_page_without_numbers_of_source_groups(tmp_path):
    run = shutil.copytree(Path(__file__).parents[1] / "fixtures" / "v0.1.0" / "run", tmp_path / "r")
    made = write_page(run).read_text()
    assert "held-out: 2 clips" in made
    assert "source group" not in made
