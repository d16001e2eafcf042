"""Warnings about a run that its own record justifies."""

import pytest

from wanlora.commands.train.advice import (
    best_held_out,
    last_held_out,
    warn_of_overfitting,
    warn_of_rate_jump,
    warn_of_worse_than_base,
)
from wanlora.runs import run_folder
from wanlora.runs.checkpoints import Progress

KEYS = {"val": "v", "train": "t"}


def row(step, split, mean, *, base=1.0, **more):
    return {
        "step": step, "split": split, "weights": "adapter", "panel": KEYS[split], "mean": mean,
        "base_mean": base, "difference": mean - base,
    } | more  # fmt: skip


def test_overfitting_is_reported_after_two_validations_that_part(tmp_path, caplog):
    def validate(step, train, val, **more):
        for split, mean in (("train", train), ("val", val)):
            run_folder.append_row(
                tmp_path, run_folder.VALIDATION_NAME, row(step, split, mean, **more)
            )
        rows = run_folder.read_rows(tmp_path, run_folder.VALIDATION_NAME)
        warn_of_overfitting(rows, KEYS, best_step=1)

    validate(0, 0.95, 0.1, panel="of other clips")
    for step, train, val in ((1, 0.9, 0.9), (2, 0.8, 0.8), (3, 0.7, 0.85)):
        validate(step, train, val)
        # The moving average has a curve of its own.
        average = row(step, "val", 0.1 * step, weights="ema")
        run_folder.append_row(tmp_path, run_folder.VALIDATION_NAME, average)
    assert "overfitting" not in caplog.text
    validate(4, 0.6, 0.95)
    assert "overfitting" in caplog.text
    assert "best/" in caplog.text


def test_rows_of_releases_without_panels_do_not_count(tmp_path, caplog):
    for step in range(4):
        for split, slope in (("train", -0.1), ("val", 0.1)):
            old = {"step": step, "split": split, "mean": 1 + slope * step}
            run_folder.append_row(tmp_path, run_folder.VALIDATION_NAME, old)
    rows = run_folder.read_rows(tmp_path, run_folder.VALIDATION_NAME)
    for keys in (KEYS, {"val": "v"}, {}):
        warn_of_overfitting(rows, keys, best_step=None)
    assert not caplog.text


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (row(6, "val", 0.9), ["best/", "step 6", "0.9000", "-10.00 %"]),
        (row(6, "val", 1.1), ["--learning-rate", "0.001", "--output-dir"]),
        (None, ["--learning-rate", "0.001", "--output-dir"]),
    ],
)
def test_an_adapter_worse_than_its_base_ends_with_numbers_and_a_way_out(caplog, best, expected):
    warn_of_worse_than_base(row(12, "val", 2.41), best, rate=1e-3)
    for text in ("step 12", "2.4100", "1.0000", "+141.00 %", *expected):
        assert text in caplog.text


def test_an_adapter_no_worse_than_its_base_ends_without_a_warning(caplog):
    for final in (None, row(12, "val", 1.0), row(12, "val", 0.99)):
        warn_of_worse_than_base(final, None, rate=1e-3)
    assert not caplog.text


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_longer_run_with_a_decaying_schedule_is_reported_with_both_rates(caplog, name):
    last = {"step": 999, "lr": 0.0}
    warn_of_rate_jump(name, 1e-4, last, warmup_steps=0, end_step=1000)
    assert not caplog.text
    warn_of_rate_jump(name, 1e-4, last, warmup_steps=0, end_step=2000)
    for text in ("from 0 to 5.00", "2000", "--init-adapter", "constant"):
        assert text in caplog.text.replace("5e-05", "5.00").replace("5.008e-05", "5.00")


def test_a_longer_run_with_a_constant_rate_is_not_reported(caplog):
    last = {"step": 999, "lr": 1e-4}
    warn_of_rate_jump("constant", 1e-4, last, warmup_steps=100, end_step=2000)
    assert not caplog.text


def test_the_rows_of_the_card_are_those_of_the_newest_and_of_the_best_adapter():
    rows = [
        row(6, "val", 0.8, panel="other"), row(6, "val", 0.9), row(6, "val", 0.7, weights="ema"),
        row(6, "train", 0.6), row(12, "val", 0.95, weights="ema"), row(12, "val", 1.0),
        row(12, "train", 0.5),
    ]  # fmt: skip
    assert last_held_out(rows) == rows[-2]
    best = Progress(best_step=6, best_weights="ema", panel="v")
    assert best_held_out(rows, best) == rows[2]
    assert best_held_out(rows, Progress(panel="v")) is None
