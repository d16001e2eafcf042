"""The page of a run while it lives: when it is written, and the state that it ends with."""

import html
import json
import logging
import re
import time

import numpy as np
import pytest
import torch

from tests.support.watched import GIF
from wanlora.errors import NonFiniteError
from wanlora.report.gallery import shown_steps
from wanlora.report.run_page import run_page
from wanlora.report.run_status import DONE, STOPPED
from wanlora.report.series import Metrics
from wanlora.runs import page, run_folder
from wanlora.runs.page import LivePage, RunFiles, collected_warnings, live_page
from wanlora.runs.saved_latents import write_latents


def row(step, **values):
    return {"step": step, "loss": 0.5, "loss_smoothed": 0.5, "eta_s": 60.0, **values}


def status_of(run_dir):
    return json.loads((run_dir / run_folder.STATUS_NAME).read_text())


def state_shown(run_dir):
    return re.search(r'data-state="(\w+)"', (run_dir / run_folder.PAGE_NAME).read_text())[1]


def wait_until(is_true):
    end = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_page_is_there_before_the_first_step_and_follows_the_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(page, "MAX_WAIT_S", 0.02)
    live = LivePage(tmp_path, steps_planned=10, warnings=[])
    assert status_of(tmp_path)["steps_done"] == 0
    assert state_shown(tmp_path) == "training"
    for step in range(4):
        run_folder.append_row(tmp_path, run_folder.METRICS_NAME, row(step))
    wait_until(lambda: status_of(tmp_path)["steps_done"] == 4)  # nobody asked for it
    live.end(DONE)
    found = status_of(tmp_path)
    assert (found["state"], found["steps_planned"], found["next_write_s"]) == ("done", 10, None)
    assert state_shown(tmp_path) == "done"


def test_a_page_that_is_renewed_does_not_wait_for_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "FIRST_WAIT_S", 60.0)
    run = tmp_path / "my run"
    run.mkdir()
    live = LivePage(run, steps_planned=10, warnings=[])
    run_folder.append_row(run, run_folder.METRICS_NAME, row(0))
    live.renew()
    wait_until(lambda: status_of(run)["steps_done"] == 1)
    live.end(STOPPED, "SIGTERM")
    assert status_of(run)["reason"] == "SIGTERM"
    made = html.unescape((run / run_folder.PAGE_NAME).read_text())
    assert "SIGTERM" in made
    assert f"wanlora train --output-dir '{run}' --resume" in made


@pytest.mark.parametrize(
    ("error", "state"),
    [(NonFiniteError("step 3: <NaN>"), "failed"), (KeyboardInterrupt(), "stopped"),
     (ZeroDivisionError("bug"), "failed")],
)  # fmt: skip
def test_an_error_is_the_last_state_of_the_page(tmp_path, error, state):
    with pytest.raises(type(error)), live_page(tmp_path, steps_planned=5, warnings=[]):
        raise error
    assert state_shown(tmp_path) == status_of(tmp_path)["state"] == state
    made = (tmp_path / run_folder.PAGE_NAME).read_text()
    assert "--resume" in made
    if isinstance(error, NonFiniteError):
        assert "step 3: &lt;NaN&gt;" in made


def test_a_page_that_cannot_be_written_stops_nothing_and_is_reported_once(tmp_path, caplog):
    (tmp_path / run_folder.PAGE_NAME).mkdir()
    with caplog.at_level(logging.WARNING, "wanlora"):
        live = LivePage(tmp_path, steps_planned=5, warnings=[])
        live.end(DONE)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert run_folder.PAGE_NAME in caplog.text


def test_a_damaged_preview_costs_only_its_own_picture(tmp_path, caplog):
    for name, prompt in (("00", "kept <prompt>"), ("01", "lost prompt"), ("02", "torn prompt")):
        path = tmp_path / run_folder.PREVIEWS_NAME / "step-000005" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"prompt": prompt, "seed": 0, "model": "micro", "variant": "micro"}
        write_latents(path, torch.zeros(4, 1, 2, 2), facts)
        path.with_suffix(".gif").write_bytes(GIF if name != "02" else GIF[:5])
    (path.parent / "01.safetensors").unlink()
    (tmp_path / run_folder.PREVIEWS_NAME / "step-5.bad").mkdir()
    files = RunFiles(tmp_path)
    for _ in range(2):
        made = files.page(None)
        assert "kept &lt;prompt&gt;" in made
        assert made.count("data:image/gif") == 1
    assert len(caplog.records) == 2  # each once


def test_rows_are_read_once_and_a_torn_line_is_left_for_later(tmp_path):
    files = RunFiles(tmp_path)
    files.read()
    run_folder.append_row(tmp_path, run_folder.METRICS_NAME, row(0))
    with (tmp_path / run_folder.METRICS_NAME).open("a") as file:
        file.write('{"step": 1, "lo')
    files.read()
    assert files.steps_done == 1
    with (tmp_path / run_folder.METRICS_NAME).open("a") as file:
        file.write('ss": 0.25}\n')
    files.read()
    assert files.steps_done == 2


def test_warnings_are_collected_for_the_page_each_once(tmp_path):
    log = logging.getLogger("wanlora.somewhere")
    with collected_warnings() as warnings:
        log.warning("few <clips>")
        log.warning("few <clips>")
        log.info("a note")
    log.warning("later")
    assert warnings == ["few <clips>"]
    LivePage(tmp_path, steps_planned=5, warnings=warnings).end(DONE)
    assert "few &lt;clips&gt;" in (tmp_path / run_folder.PAGE_NAME).read_text()


def validation(step, mean, base=0.5):
    difference = mean - base
    return {
        "step": step, "split": "val", "weights": "adapter", "mean": mean, "base_mean": base,
        "difference": difference, "ci95": [difference - 0.1, difference + 0.1],
        "per_sigma": [[0.5, mean, base]], "per_activity": {}, "num_clips": 3, "num_groups": 3,
    }  # fmt: skip


def titles(made, step):
    return re.findall(rf"<title>step {step}\n(.*?)</title>", made, re.DOTALL)


def test_after_one_validation_its_curves_begin_with_the_base_at_step_0():
    made = run_page(
        "r", settings={}, metrics=Metrics(), validations=[validation(500, 0.4)], status=None
    )
    assert titles(made, 0) == ["held-out: 0.5\nbase (held-out): 0.5", "held-out: 0"]
    assert titles(made, 500) == ["held-out: 0.4\nbase (held-out): 0.5", "held-out: -0.1"]
    assert made.count('class="band"') == 2


def test_a_run_that_starts_from_another_adapter_is_not_the_base_at_step_0():
    made = run_page(
        "r", settings={"init_adapter": "outputs/other"}, metrics=Metrics(),
        validations=[validation(500, 0.4)], status=None,
    )  # fmt: skip
    assert titles(made, 0) == []


def test_before_the_first_validation_the_page_names_its_step():
    made = run_page(
        "r", settings={"validation": {"every": 1500}}, metrics=Metrics(), validations=[]
    )
    assert "after step 1,500" in made


def test_a_long_run_is_a_small_page_with_its_spikes():
    rows = [row(step, loss=1 + 0.01 * (step % 7), grad_norm=0.1) for step in range(50_000)]
    rows[7_777]["loss"] = 50.0
    metrics = Metrics(rows)
    points = metrics.curve("loss")
    assert len(points) <= 400
    assert (7777.0, 50.0) in points
    assert points == sorted(points)
    assert len(run_page("r", settings={}, metrics=metrics, validations=[])) < 250_000


def test_the_trend_is_the_mean_of_each_share():
    metrics = Metrics(row(step, loss=float(step % 2)) for step in range(600))
    assert metrics.trend("loss")[0] == (4.5, 0.5)
    assert len(metrics.trend("loss")) == 60
    assert Metrics(row(step) for step in range(100)).trend("loss") == []


def test_values_that_are_absent_or_not_finite_are_gaps():
    metrics = Metrics([row(0, mfu=None), row(1, mfu=0.5), row(2, mfu=np.inf), row(3)])
    assert metrics.curve("mfu") == [(1.0, 0.5)]
    assert metrics.median("mfu") == 0.5
    assert metrics.median("lr") is None


@pytest.mark.parametrize("num_prompts", [0, 1, 8, 40])
def test_columns_of_the_gallery_are_spread_and_hold_the_first_and_the_newest(num_prompts):
    steps = shown_steps(range(0, 10_001, 250), num_prompts)
    assert (steps[0], steps[-1]) == (0, 10_000)
    assert 3 <= len(steps) <= 8
    assert len(steps) * num_prompts <= max(64, 3 * num_prompts)
