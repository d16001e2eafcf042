"""Damaged rows are counted and left out; usable rows stay."""

import json

import pytest

from tests.support.watched import lines, metrics_row, status, validation_row
from wanlora.commands.watch import records


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "null", "7", '"text"', '{"loss": 1}', '{"step": -1}', '{"step": true}',
     '{"step": 1.5}', '{"step": 1, "loss": NaN}', '{"step": 1, "loss": [1]}',
     '{"step": 1, "loss": "x"}', f'{{"step": 1, "loss": {10**400}}}', f'{{"step": {10**400}}}',
     '{"step": 1, "eta_s": true}', "\ufffd", "[" * 9999],
)  # fmt: skip
def test_a_damaged_row_of_metrics_is_counted(line):
    data = f"{lines([metrics_row(0)])}{line}\n{lines([metrics_row(2)])}"
    found = records.metrics_rows(data.encode())
    assert [row["step"] for row in found.rows] == [0, 2]
    assert found.num_damaged == 1


@pytest.mark.parametrize(
    "damage",
    [{"mean": None}, {"base_mean": 0}, {"ci95": [1]}, {"ci95": "x"}, {"per_sigma": None},
     {"per_sigma": [[1, 2]]}, {"per_activity": []}, {"per_activity": {"a": ["x", 1]}},
     {"split": None}, {"step": "1"}, {"num_clips": "many"}, {"mean": 10**400}, {"mean": 1e308},
     {"base_mean": 1e-320}, {"panel": ["p"]}, {"num_groups": "6"}, {"per_activity": {"a": [1, 0]}}],
)  # fmt: skip
def test_a_damaged_row_of_validations_is_counted(damage):
    data = lines([validation_row(5, 0.4), validation_row(10, 0.4) | damage])
    found = records.validation_rows(data.encode())
    assert ([row["step"] for row in found.rows], found.num_damaged) == ([5], 1)


def test_a_line_that_is_being_written_is_not_damaged():
    data = lines([metrics_row(0)]) + '{"step": 1, "lo'
    assert records.metrics_rows(data.encode()) == ([metrics_row(0)], 0)
    assert records.last_metrics(data.encode())["step"] == 0


def test_the_last_row_is_found_in_the_end_of_a_file():
    data = lines([metrics_row(step) for step in range(9)]).encode()
    assert records.last_metrics(data[-700:] + b"broken\n")["step"] == 8
    assert records.last_metrics(b"no rows\n") is None
    assert records.last_metrics(b"") is None


@pytest.mark.parametrize(
    "damage",
    [{"version": 2}, {"state": None}, {"steps_done": "1"}, {"written_at": None},
     {"started_at": float("nan")}, {"started_at": 1e18}, {"started_at": -1.0},
     {"steps_planned": 10**400}],
)  # fmt: skip
def test_a_damaged_or_later_status_is_none(damage):
    assert records.status(json.dumps(status()).encode()) is not None
    assert records.status(json.dumps(status() | damage).encode()) is None
    assert records.status(b"{") is None
    assert records.status(None) is None


def test_damaged_settings_are_empty():
    assert records.settings(b"seed = ") == {}
    assert records.settings(b"\xff") == {}
    assert records.settings(b"seed = 1") == {"seed": 1}


def test_the_best_is_the_lowest_of_the_clips_measured_last():
    rows = [
        validation_row(5, 0.1, panel="old"),
        validation_row(10, 0.4, panel="new"),
        validation_row(15, 0.3, panel="new"),
        validation_row(15, 0.2, panel="new", split="train"),
        validation_row(20, 0.35, panel="new"),
    ]
    assert records.best_held_out(rows)["step"] == 15
    assert records.best_held_out([]) is None


def test_the_prompt_of_a_preview_is_in_its_header():
    head = json.dumps({"__metadata__": {"wanlora.prompt": "a <dog>"}}).encode()
    data = len(head).to_bytes(8, "little") + head
    assert records.preview_prompt(data + b"tensors") == "a <dog>"
    for damaged in (b"", data[:20], b"\xff" * 30, (2).to_bytes(8, "little") + b"[]"):
        assert records.preview_prompt(damaged) is None
