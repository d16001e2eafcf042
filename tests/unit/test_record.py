"""Figures of a step, and what the trackers were told, read back with TensorBoard's own reader."""

import importlib.util
import sys
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wanlora.errors import ConfigError
from wanlora.runs.record import Recorder, Smoothed, check_trackers, device_name, step_figures

CPU = torch.device("cpu")
REPORT = {
    "step": 4, "split": "val", "mean": 0.5, "base_mean": 0.6, "difference": -0.1,
    "standard_error": 0.02, "ci95": [-0.15, -0.05],
    "per_sigma": [[0.25, 0.4, 0.5], [0.75, 0.6, 0.7]], "per_activity": {"walking": [0.5, 0.6]},
}  # fmt: skip


def read(folder):
    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    return events


def curve(folder, name="train/loss"):
    return [(event.step, round(event.value, 5)) for event in read(folder).Scalars(name)]


def test_the_smoothed_mean_is_not_drawn_towards_zero():
    losses = [2.0, 4.0, 3.0]
    weights = [0.02 * 0.98**age for age in (2, 1, 0)]
    smoothed = Smoothed().add_all(losses)
    assert smoothed.value == pytest.approx(np.average(losses, weights=weights))
    assert Smoothed().add(5.0).value == pytest.approx(5.0)
    assert Smoothed().value is None


def test_a_resumed_run_rebuilds_the_smoothed_mean_bit_for_bit():
    losses = list(np.random.default_rng(0).random(50))
    whole = Smoothed().add_all(losses)
    assert Smoothed().add_all(losses[:20]).add_all(losses[20:]) == whole


def figures(**given):
    values = {
        "loss": Smoothed().add(0.5), "pace": Smoothed().add_all([1.0, 3.0]), "seconds": 2.0,
        "waited_s": 0.5, "flops": 400e12, "device": CPU, "device_name": "cpu", "steps_left": 10,
    }  # fmt: skip
    return step_figures(**(values | given))


def test_a_row_says_how_fast_and_how_full():
    said = figures(device_name="NVIDIA H100 80GB HBM3")
    assert (said["tflops"], said["data_wait_pct"], said["s_per_step"]) == (200.0, 25.0, 2.0)
    assert said["mfu"] == pytest.approx(200 / 989.4)
    assert said["loss_smoothed"] == pytest.approx(0.5)
    assert 0.05 < said["peak_memory_gb"] < 200  # this process
    assert 20 < said["eta_s"] < 20.5  # ten steps at the smoothed pace, a little over 2 s


def test_a_cpu_has_no_mfu_but_says_what_it_achieved():
    assert figures(device_name=device_name(CPU))["mfu"] is None
    assert figures()["tflops"] == 200.0


def test_curves_go_to_tensorboard(tmp_path):
    with closing(
        Recorder(tmp_path, ["tensorboard"], {"lora": {"rank": 8}}, first_step=0)
    ) as recorder:
        recorder.step({"step": 0, "loss": 0.5, "mfu": None, "lr": 1e-4})
        recorder.step({"step": 1, "loss": 0.25, "mfu": None, "lr": 2e-4})
        recorder.validation(2, REPORT)
        recorder.images(2, "previews/0", np.full((3, 8, 8, 3), 90, np.uint8))
    assert curve(tmp_path) == [(0, 0.5), (1, 0.25)]
    assert curve(tmp_path, "validation/val/difference_low") == [(2, -0.15)]
    assert curve(tmp_path, "validation_by_sigma/val/0.750") == [(2, 0.6)]
    events = read(tmp_path)
    assert "train/mfu" not in events.Tags()["scalars"]
    assert events.Tags()["images"] == ["previews/0"]
    settings = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]
    assert b'"rank": 8' in settings


def test_a_resumed_run_replaces_the_steps_it_does_again(tmp_path):
    with closing(Recorder(tmp_path, ["tensorboard"], {}, first_step=0)) as recorder:
        for step in range(6):  # killed after 6, with a checkpoint at 3
            recorder.step({"step": step, "loss": float(step)})
    time.sleep(1.1)  # TensorBoard orders files by the second they were opened in
    with closing(Recorder(tmp_path, ["tensorboard"], {}, first_step=3)) as recorder:
        recorder.step({"step": 3, "loss": 30.0})
    assert curve(tmp_path) == [(0, 0), (1, 1), (2, 2), (3, 30)]


def test_no_trackers_write_nothing(tmp_path):
    with closing(Recorder(tmp_path, [], {}, first_step=0)) as recorder:
        recorder.step({"step": 0, "loss": 1.0})
        recorder.validation(1, REPORT)
        recorder.images(1, "x", np.zeros((1, 4, 4, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def offer_wandb(monkeypatch, folder, text):
    """Let `import wandb` find this text, in this test only."""
    (folder / "wandb.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(sys.modules, "wandb", None)  # `delitem` would not remove it afterwards
    del sys.modules["wandb"]


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("import no_such_part", ["ModuleNotFoundError", "no_such_part"]),
        ("raise ImportError('libfoo.so.3 is missing')", ["libfoo.so.3"]),
        ("raise TypeError('protobuf 9')", ["TypeError", "protobuf 9"]),
        ("", ["pip install wandb"]),
    ],
)
def test_a_wandb_that_does_not_work_is_refused_with_its_own_error(
    tmp_path, monkeypatch, text, facts
):
    offer_wandb(monkeypatch, tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        check_trackers(["tensorboard", "wandb"])
    assert all(fact in str(refused.value) for fact in facts)
    check_trackers(["tensorboard"])


def test_a_wandb_that_does_not_start_is_refused_with_its_own_error(tmp_path, monkeypatch):
    offer_wandb(monkeypatch, tmp_path, "def init(**_): raise ValueError('no api key')")
    with pytest.raises(ConfigError, match="no api key"):
        Recorder(tmp_path / "run", ["wandb"], {}, first_step=0)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_not_installed_is_an_error_before_training(tmp_path):
    with pytest.raises(ConfigError, match="pip install wandb"):
        Recorder(tmp_path, ["tensorboard", "wandb"], {}, first_step=0)
