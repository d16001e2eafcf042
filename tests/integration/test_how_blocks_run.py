"""`train` chooses how blocks run, says so, and refuses what does not work here with the way out."""

import re
import subprocess
import sys

import pytest

from tests.support import cli

ADAPTER = "pytorch_lora_weights.safetensors"


def train(cache, run, *more):
    return cli.invoke(
        "train", "--cache", cache, "--output-dir", run, "--max-steps", 2, "--set", "lora.rank=2",
        "--set", "validation.every=0", "--set", "trackers=[]", *more,
    )  # fmt: skip


def test_what_is_recomputed_changes_no_bit_of_the_adapter(cache_fp16, tmp_path, caplog):
    adapters = {}
    for way in ("auto", "selective", "full"):
        result = train(cache_fp16, tmp_path / way, "--activations", way, "--eager")
        assert result.exit_code == 0, result.output
        adapters[way] = (tmp_path / way / ADAPTER).read_bytes()
    assert adapters["auto"] == adapters["selective"] == adapters["full"]
    assert "activations none: " in caplog.text  # auto, and there is room
    assert "activations selective: " in caplog.text
    assert "attention by _scaled_dot_product_flash_attention_for_cpu" in caplog.text
    assert "time per step: " in caplog.text
    assert "by the trial" in caplog.text


def test_an_attention_kernel_that_does_not_run_here_is_refused(cache_fp16, tmp_path):
    said = cli.refuses(
        "train", "--cache", cache_fp16, "--output-dir", tmp_path / "run",
        "--set", "attention=cudnn",
    )  # fmt: skip
    assert "on cpu" in said
    assert "--set attention=auto" in said
    compiled = cli.run(
        "train", "--cache", cache_fp16, "--output-dir", tmp_path / "run",
        "--set", "attention=cudnn", "--eager", "off", exit_code=1,
    )  # fmt: skip
    assert re.search(r"attention=cudnn .*on cpu", compiled.stderr)
    said = cli.refuses(
        "train", "--cache", cache_fp16, "--output-dir", tmp_path / "run", "--set", "attention=fa4"
    )
    assert "attention=fa4" in said
    assert not (tmp_path / "run").exists()


def test_blocks_that_cannot_be_compiled_are_refused_with_the_way_without(
    cache_fp16, tmp_path, monkeypatch
):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    done = cli.run(
        "train", "--cache", cache_fp16, "--output-dir", tmp_path / "run", "--eager", "off",
        exit_code=1,
    )  # fmt: skip
    assert "compiled on cpu" in done.stderr
    assert "--eager" in done.stderr
    assert "Traceback" not in done.stderr


def test_dora_runs_eager_and_is_refused_where_it_would_not_be_true(cache_fp16, tmp_path):
    said = cli.refuses(
        "train", "--cache", cache_fp16, "--output-dir", tmp_path / "run", "--eager", "off",
        "--set", "lora.dora=true", exit_code=2,
    )  # fmt: skip
    assert "DoRA cannot be compiled" in said
    said = cli.refuses("estimate", "--set", "lora.dora=true", exit_code=2)
    assert "--probe" in said


def fit_into(room_mb: int, activations: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.little_memory", activations, str(room_mb)],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return done.stdout


def test_memory_that_runs_out_is_refused_with_what_would_fit():
    said = fit_into(500, "none").splitlines()[-1]
    assert re.match(r"refused: .*memory .*cpu .*\(17x96x96, 180 ", said)
    assert "--activations full (" in said
    assert "--set train_frames=13" in said


@pytest.mark.slow
def test_auto_recomputes_more_until_it_fits():
    *tried, last = fit_into(500, "auto").splitlines()
    assert re.match(r".*memory .*activations none \(", tried[0])
    assert last.startswith("fits: ")
    assert "selective" in last
