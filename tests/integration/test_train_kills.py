"""Killed at any durable file operation, a checkpoint's publication included, a run ends the same.

Also: how a run is divided, over micro-batches or processes, changes nothing but rounding.
"""

import json
import random
import signal
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.support import cli, hooks, processes

NAME = "pytorch_lora_weights.safetensors"
STEPS = 6
ARGUMENTS = (
    "--max-steps", STEPS, "--gradient-accumulation-steps", 2, "--learning-rate", 1e-3,
    "--save-steps", 2, "--set", "lora.rank=2", "--set", "lora.targets=attention",
    "--set", "optimizer.warmup_steps=2", "--set", "keep_checkpoints=0", "--set", "ema_decay=0.9",
    "--set", "validation.every=3", "--set", "validation.num_clips=2",
    "--set", "validation.num_sigmas=2", "--set", "validation.split=train",
    "--set", "trackers=[]",
)  # fmt: skip


def _content(run_dir):
    """Everything a run leaves that must not depend on whether it was killed."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    optimizer = torch.load(run_dir / "checkpoints" / f"step-{STEPS:06d}" / "optimizer.pt")
    return {
        "metrics": [(row["step"], row["loss"], row["lr"], row["grad_norm"]) for row in rows],
        "validation": (run_dir / "validation.jsonl").read_text(),
        "adapters": [(run_dir / part / NAME).read_bytes() for part in (".", "best", "ema")],
        "moments": [
            tensor.numpy().tobytes()
            for tensors in optimizer["parameters"].values()
            for tensor in tensors.values()
        ],
    }


def _killed_runs(cache, folder, num_kills, seed):
    """Kill a run at some places, resuming each time; yield what each left, and the whole."""
    draw, log = random.Random(seed), folder / "operations"
    train = ("train", "--cache", cache, *ARGUMENTS, "--output-dir")
    cli.run(*train, folder / "whole", before=[partial(hooks.count_operations, log)])
    whole, operations = _content(folder / "whole"), log.stat().st_size
    for number in range(num_kills):
        run_dir = folder / f"killed-{number}"
        at, after = draw.randint(1, operations), draw.random() < 0.5
        killed = partial(hooks.count_operations, log, kill_at=at, after=after)
        cli.run(*train, run_dir, before=[killed], exit_code=-signal.SIGKILL)
        cli.run(*train, run_dir, "--resume")
        yield (at, operations, after), _content(run_dir), whole


def test_a_run_killed_while_it_writes_ends_with_the_same_bits(cache_fp16, tmp_path):
    for where, killed, whole in _killed_runs(cache_fp16, tmp_path, 4, seed=5):
        assert killed == whole, where


@pytest.mark.slow
def test_ten_runs_killed_while_they_write_end_with_the_same_bits(cache_fp16, tmp_path):
    for where, killed, whole in _killed_runs(cache_fp16, tmp_path, 10, seed=6):
        assert killed == whole, where


def _losses_and_tensors(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    tensors = safetensors.torch.load_file(run_dir / NAME)
    return np.array([row["loss"] for row in rows]), tensors


DIVIDED = (
    "--max-steps", 5, "--learning-rate", 1e-3, "--set", "lora.rank=2", "--save-steps", 0,
    "--set", "optimizer.warmup_steps=2", "--set", "caption_dropout=0.2", "--set", "trackers=[]",
    "--set", "validation.every=0",
)  # fmt: skip


def test_micro_batches_change_nothing_but_rounding(cache_fp32, tmp_path):
    results = []
    for size, times in ((1, 4), (2, 2), (4, 1)):
        run_dir = tmp_path / f"{size}x{times}"
        done = cli.invoke(
            "train", "--cache", cache_fp32, "--output-dir", run_dir, *DIVIDED,
            "--batch-size", size, "--gradient-accumulation-steps", times,
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        results.append(_losses_and_tensors(run_dir))
    for losses, tensors in results[1:]:
        np.testing.assert_allclose(losses, results[0][0], rtol=1e-6)
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, results[0][1][name], rtol=0, atol=1e-5)


def test_two_processes_are_one(cache_fp32, tmp_path):
    common = ("train", "--cache", cache_fp32, *DIVIDED, "--gradient-accumulation-steps", 4)
    done = cli.invoke(*common, "--output-dir", tmp_path / "one")
    assert done.exit_code == 0, done.output
    ended = processes.run(tmp_path / "log", (*common, "--output-dir", tmp_path / "two"), count=2)
    assert "2 processes" in ended[0].text
    one, two = _losses_and_tensors(tmp_path / "one"), _losses_and_tensors(tmp_path / "two")
    assert two[0][0] == one[0][0]
    np.testing.assert_allclose(two[0], one[0], rtol=1e-6)
    for name, tensor in two[1].items():
        torch.testing.assert_close(tensor, one[1][name], rtol=0, atol=1e-5)
