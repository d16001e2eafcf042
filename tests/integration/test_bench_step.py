"""The benchmarks of stage two run: their tiny form, and the loader's at full size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[2] / "bench"


def run(script, *arguments, output):
    command = [sys.executable, str(BENCH / script), *map(str, arguments)]
    subprocess.run(command, check=True, timeout=400, stdout=subprocess.DEVNULL)
    return json.loads(output.read_text())


def test_every_variant_of_the_step_computes_the_same(tmp_path):
    output = tmp_path / "step.json"
    found = run("step.py", "--steps", 1, "--warmup", 0, "--output", output, output=output)
    (case,) = found["cases"]
    rows = {row["variant"]: row for row in case["rows"]}
    assert list(rows) == [
        "seed", "naive", "fullckpt", "fullckpt_cudnn", "eager", "full", "selective", "none", "auto"
    ]  # fmt: skip
    assert found["tiny"]
    assert case["floor_s"] > 0
    for row in rows.values():
        assert row["loss"] == pytest.approx(rows["fullckpt"]["loss"], rel=1e-5)
        assert row["gradient_cosine"] > 0.9999
        assert row["attention"] == ["_scaled_dot_product_flash_attention_for_cpu"]
        assert row["seed takes"] > 0


def test_a_step_of_1_7_seconds_waits_for_a_hundredth_of_it_at_most(tmp_path):
    """Latents of 81x480x832; two threads read ahead."""
    output = tmp_path / "loader.json"
    found = run("loader.py", "--clips", 8, "--steps", 6, "--json", output, output=output)
    assert found["stall_pct"] <= 1
    assert found["without_reading_ahead_pct"] > found["stall_pct"]
