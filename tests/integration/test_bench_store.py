"""The measuring scripts run: their tiny form, which measures nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def test_the_store_benchmark_runs_and_loses_at_most_a_segment_a_kill(tmp_path):
    output = tmp_path / "figures.json"
    command = [sys.executable, str(BENCH / "store.py"), "--tiny", "--output", str(output)]
    subprocess.run(command, check=True, timeout=300, stdout=subprocess.DEVNULL)
    figures = json.loads(output.read_text())
    assert figures["formats"][0]["format"] == "this store"
    for row in figures["kills"]:
        assert row["wrong"] == 0
        assert row["lost"] <= 8 * row["kills"]


@pytest.mark.slow
def test_the_benchmark_of_scale_runs_and_a_snapshot_spares_every_commit_record(tmp_path):
    output = tmp_path / "figures.json"
    command = [sys.executable, str(BENCH / "scale.py"), "--clips", "640", "--output", str(output)]
    done = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    figures = json.loads(output.read_text())
    assert [row["records_read"] for row in figures["index"]] == [40, 40, None, 0, 64]
    assert figures["start"][0]["trained_on"] == 608
    assert figures["requests"][0]["gets"] <= 10
    page = (BENCH.parent / "docs" / "scale.md").read_text()
    for row in figures["cluster"]:
        line = f"| {' | '.join(row.values())} |"
        assert line in done.stdout
        if row["how"] in ("counted", "predicted"):
            assert line in page
        else:  # what was measured differs from machine to machine
            assert f"| {row['figure']} |" in page


@pytest.mark.slow
def test_the_benchmark_of_stage_one_runs(tmp_path, micro_home):
    output = tmp_path / "figures.json"
    command = [sys.executable, str(BENCH / "stage_one.py"), "--tiny", "--output", str(output)]
    subprocess.run(command, check=True, timeout=600, stdout=subprocess.DEVNULL)
    figures = json.loads(output.read_text())
    assert {row["beside"] for row in figures["threads"]} == {"nothing", "a thread", "a process"}
    assert [row["clips"] for row in figures["memory"]] == [5, 10]


@pytest.mark.slow
def test_the_check_of_real_weights_runs_on_the_micro_model(micro_folder, tmp_path):
    command = [
        sys.executable, str(BENCH / "check_real.py"), "--model", str(micro_folder), "--device",
        "cpu", "--output", str(tmp_path / "out"), "--steps", "2", "--sample-frames", "5",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads((tmp_path / "out" / "seen.json").read_text())
    assert seen["tokens"][0] == 1
    assert seen["tokens"][-1] == 512
    assert len(seen["losses"]) >= 3
    assert (tmp_path / "out" / "sample.mp4").is_file()
