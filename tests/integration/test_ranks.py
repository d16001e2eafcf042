"""A run of several processes: one is lost, hangs or refuses; their number changes; one copy."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch
from filelock import FileLock

from tests.support import cli, processes
from tests.support.s3 import free_port

NAME = "pytorch_lora_weights.safetensors"
STEPS = 12
SETTINGS = (
    "--gradient-accumulation-steps", 4, "--learning-rate", 1e-3, "--save-steps", 2,
    "--set", "lora.rank=2", "--set", "lora.targets=attention", "--set", "optimizer.warmup_steps=2",
    "--set", "ema_decay=0.9", "--set", "trackers=[]", "--set", "validation.num_clips=3",
    "--set", "validation.num_sigmas=2", "--set", "keep_checkpoints=0", "--device", "cpu",
)  # fmt: skip


def train(cache, run_dir, *more, every=6, steps=STEPS):
    return (
        "train", "--cache", cache, "--output-dir", run_dir, *SETTINGS, "--max-steps", steps,
        "--set", f"validation.every={every}", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(held_out_cache, tmp_path_factory):
    """A run of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    ended = processes.run(folder / "log", train(held_out_cache, folder / "run", "--json"), count=2)
    return folder / "run", ended


def rows(run_dir, name="metrics.jsonl"):
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def content(run_dir):
    optimizer = torch.load(run_dir / "checkpoints" / f"step-{STEPS:06d}" / "optimizer.pt")
    return {
        "losses": [(row["step"], row["loss"], row["grad_norm"]) for row in rows(run_dir)],
        "validation": rows(run_dir, "validation.jsonl"),
        "adapters": [(run_dir / part / NAME).read_bytes() for part in (".", "best", "ema")],
        "moments": [
            tensor.numpy().tobytes()
            for tensors in optimizer["parameters"].values()
            for tensor in tensors.values()
        ],
    }


def wait_for(path):
    """Wait until a folder exists, or a file with content: of a file, the first step is done."""
    deadline = time.monotonic() + 300
    while not path.exists() or not path.stat().st_size:
        assert time.monotonic() < deadline, path
        time.sleep(0.005)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_stops_the_other_and_the_resumed_run_ends_with_the_same_bits(
    whole, held_out_cache, tmp_path, victim
):
    run_dir = tmp_path / "run"
    command = train(held_out_cache, run_dir)
    moment = run_dir / "checkpoints" / "step-000002"
    ended = processes.start(
        tmp_path / "log", [command] * 2, victim=(victim, signal.SIGKILL, moment)
    ).wait()
    assert [each.code for each in ended] == ([-9, 1] if victim == 0 else [1, -9])
    left = ended[1 - victim].text
    assert f"error: process {1 - victim} of 2: lost process {victim}" in left
    assert re.search(r"--resume.* processes", left)
    assert "Traceback" not in left
    assert not (run_dir / "checkpoints" / f"step-{STEPS:06d}").exists()
    with FileLock(run_dir / ".lock").acquire(timeout=0):
        pass
    processes.run(tmp_path / "resumed", (*command, "--resume"), count=2)
    assert content(run_dir) == content(whole[0])


def test_a_run_goes_on_with_other_numbers_of_processes(whole, held_out_cache, tmp_path):
    run_dir = tmp_path / "run"
    for count, steps in ((2, 4), (1, 8), (4, STEPS)):
        by_time = ("--save-minutes", 1e-9, "--save-steps", 0)
        command = train(held_out_cache, run_dir, "--resume", *by_time, steps=steps)
        processes.run(tmp_path / str(count), command, count=count)
    assert len(list((run_dir / "checkpoints").iterdir())) >= STEPS // 2
    expected, found = rows(whole[0]), rows(run_dir)
    assert [row["step"] for row in found] == list(range(STEPS))
    np.testing.assert_allclose(
        [row["loss"] for row in found], [row["loss"] for row in expected], rtol=1e-6
    )
    ours, theirs = (safetensors.torch.load_file(d / NAME) for d in (run_dir, whole[0]))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5)


def test_a_process_that_hangs_is_named_after_the_time_that_was_set(held_out_cache, tmp_path):
    run_dir = tmp_path / "run"
    command = train(held_out_cache, run_dir, "--set", "process_timeout_s=10", every=0)
    moment = run_dir / "checkpoints" / "step-000002"
    launched = processes.start(tmp_path / "log", [command] * 2, victim=(1, signal.SIGSTOP, moment))
    left, hangs = launched.processes
    left.wait()
    hangs.kill()
    ended = launched.wait()
    assert [each.code for each in ended] == [1, -9]
    assert re.search(r"lost process 1: .*\b10 s \(process_timeout_s\)", ended[0].text)


def test_a_process_that_starts_alone_says_what_it_waits_for(held_out_cache, tmp_path):
    command = train(held_out_cache, tmp_path / "run", "--set", "process_timeout_s=2")
    (alone,) = processes.start(tmp_path / "log", [command], WORLD_SIZE="2").wait()
    assert alone.code == 1, alone.text
    assert "cannot connect" in alone.text
    assert "2 s (process_timeout_s)" in alone.text
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_process_stops_the_others_too(held_out_cache, tmp_path):
    damaged = tmp_path / "cache"
    shutil.copytree(held_out_cache, damaged)
    for path in (damaged / "store.zarr" / "latents").rglob("*"):
        if "c" in path.parts and path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run_dir = tmp_path / "run"
    commands = [train(cache, run_dir) for cache in (held_out_cache, damaged)]
    ended = processes.start(tmp_path / "log", commands).wait()
    assert [each.code for each in ended] == [1, 1]
    assert "process 1 of 2: latents" in ended[1].text
    assert f"wanlora inspect {damaged} --repair" in ended[1].text
    assert "lost process 1" in ended[0].text


def test_processes_that_would_train_different_runs_are_refused(whole, held_out_cache, tmp_path):
    commands = [train(held_out_cache, tmp_path / "run", "--seed", seed) for seed in (0, 1)]
    first, second = processes.start(tmp_path / "seeds", commands).wait()
    assert (first.code, second.code) == (1, 1)
    assert re.search(r"process 1 of 2 .*process 0:", first.text)
    assert "settings.seed: found 1, wanted 0" in first.text
    assert "process 0 stopped" in second.text
    assert not (tmp_path / "run").exists()

    commands = [train(held_out_cache, d, "--resume") for d in (whole[0], tmp_path / "elsewhere")]
    first, second = processes.start(tmp_path / "folders", commands).wait()
    assert (first.code, second.code) == (1, 1)
    assert re.search(r"--output-dir .*nodes", second.text)

    first, second = processes.start(
        tmp_path / "again", [train(held_out_cache, whole[0])] * 2
    ).wait()
    assert "already holds a run" in first.text
    assert "process 0 stopped" in second.text


def test_a_step_sums_the_adapters_gradient_once_whatever_the_accumulation(whole):
    result = json.loads(whole[1][0].out)
    size = result["trainable_parameters"]
    for each in whole[1]:
        assert each.calls[f"all_reduce {size}"] == STEPS
        # The losses of a process's two slots, its stop request and its request to save.
        assert each.calls["all_gather 4"] == STEPS
        # Two panels of three clips at two sigmas, twice, and once for the base; the held-out panel
        # also twice for the moving average. A stop request is shared after each.
        assert each.calls["all_reduce 6"] == each.calls["all_reduce 1"] == 8
        assert each.calls["meet"] == STEPS + 8 + 1  # before each sum, and at the end
        others = sum(n for call, n in each.calls.items() if not call.startswith("fetch"))
        assert others == 3 * STEPS + 25
    assert result["num_processes"] == 2
    assert result["sent_bytes_per_step"] == 4 * size
    assert not whole[1][1].out


def test_processes_of_a_node_fetch_each_row_of_a_bucket_once(
    s3, micro_home, npz_manifest, tmp_path
):  # fmt: skip
    made = cli.invoke("cache-latents", "--manifest", npz_manifest, "--cache", s3, "--model",
                      "micro", "--set", "store.clips_per_segment=2")  # fmt: skip
    assert made.exit_code == 0, made.output
    nodes = [tmp_path / "node-0", tmp_path / "node-0", tmp_path / "node-1", tmp_path / "node-1"]
    commands = [
        train(s3, tmp_path / "run", "--local-copy", node, every=0, steps=4) for node in nodes
    ]
    ended = processes.start(tmp_path / "log", commands).wait()
    assert [each.code for each in ended] == [0] * 4, ended[0].text
    for node in (ended[:2], ended[2:]):
        rows = [call for each in node for call in each.calls.elements() if "fetch" in call]
        assert len(rows) == len(set(rows)) > 2
    assert not list(tmp_path.rglob("*.lock"))[1:]  # the run's own alone


def launch(launcher, arguments):
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "-m", "wanlora", *map(str, arguments)],
        env=os.environ | cli.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_accelerates_launcher_starts_a_run(held_out_cache, tmp_path):
    arguments = train(held_out_cache, tmp_path / "run", steps=2, every=0)
    launcher = ("accelerate.commands.launch", "--cpu", "--num_processes", "1")
    process = launch((*launcher, "--mixed_precision", "bf16"), arguments)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert said.count("ACCELERATE_MIXED_PRECISION=bf16") == 1  # not used, and named once
    assert "ACCELERATE_DYNAMO_BACKEND" not in said  # accelerate's own default
    assert "trained steps 0 to 1" in said


@pytest.mark.slow
def test_a_node_that_is_gone_with_its_launcher_stops_the_other_node(held_out_cache, tmp_path):
    arguments = train(held_out_cache, tmp_path / "run", steps=400, every=0)
    port = free_port()
    nodes = [
        launch(
            ("torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank",
             str(node), "--master_addr", "127.0.0.1", "--master_port", str(port)),
            arguments,
        )
        for node in (0, 1)
    ]  # fmt: skip
    wait_for(tmp_path / "run" / "checkpoints" / "step-000002")
    for process in (*psutil.Process(nodes[1].pid).children(), nodes[1]):
        process.kill()
    nodes[1].communicate()
    said, _ = nodes[0].communicate(timeout=60)
    assert nodes[0].returncode == 1
    assert re.search(r"process 0 of 2: .*process 1", said)


def check_saved_after_the_last_step(run_dir):
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{len(rows(run_dir)):06d}"


def test_repeated_sigterm_to_all_processes_still_saves(held_out_cache, tmp_path):
    run_dir = tmp_path / "run"
    command = train(held_out_cache, run_dir, "--save-steps", 0, steps=4000, every=0)
    launched = processes.start(tmp_path / "log", [command] * 2)
    wait_for(run_dir / "metrics.jsonl")
    while any(process.poll() is None for process in launched.processes):
        for process in launched.processes:  # also while process 0 saves for both
            process.terminate()
        time.sleep(0.02)
    ended = launched.wait()
    assert [each.code for each in ended] == [143, 143], [each.text for each in ended]
    check_saved_after_the_last_step(run_dir)


@pytest.mark.slow
def test_sigterm_to_the_workers_and_then_to_torchrun_still_saves(held_out_cache, tmp_path):
    run_dir = tmp_path / "run"
    arguments = train(held_out_cache, run_dir, "--save-steps", 0, steps=4000, every=0)
    launcher = launch(("torch.distributed.run", "--standalone", "--nproc_per_node", "2"), arguments)
    wait_for(run_dir / "metrics.jsonl")
    for worker in psutil.Process(launcher.pid).children():
        worker.terminate()
    time.sleep(0.1)
    launcher.terminate()
    output, _ = launcher.communicate(timeout=60)
    check_saved_after_the_last_step(run_dir)
    assert output.count("SIGTERM: saving") == 1, output
