"""A killed run continues bit for bit."""

import json
import random
import re
import shutil
import time
import tomllib
from pathlib import Path

import pytest
import torch

from tests.support import cli
from tests.support.watched import state
from wanlora.commands.train import preflight
from wanlora.config import TrainConfig
from wanlora.errors import AdapterError
from wanlora.runs import publish

STEPS = 12
ARGUMENTS = (
    "--max-steps", STEPS, "--batch-size", 2, "--gradient-accumulation-steps", 2,
    "--learning-rate", 1e-3, "--save-steps", 2, "--seed", 3, "--set", "caption_dropout=0.3",
    "--set", "lora.rank=4", "--set", "optimizer.warmup_steps=3", "--set", "keep_checkpoints=0",
    "--set", "optimizer.schedule=cosine",
)  # fmt: skip


def _metrics(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _learned(rows):
    return [(row["step"], row["loss"], row["lr"], row["grad_norm"]) for row in rows]


def _kill_after(num_steps: int, *arguments):
    """Start a run and send SIGKILL once it has logged that many steps."""
    process = cli.start(*arguments)
    run_dir = Path(arguments[arguments.index("--output-dir") + 1])
    deadline = time.monotonic() + 240
    while len(_metrics(run_dir)) < num_steps and process.poll() is None:
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.005)
    time.sleep(random.Random(num_steps).random() * 0.05)
    process.kill()
    process.wait()


def test_a_run_killed_twice_ends_with_the_same_bits(cache_fp16, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    cli.run("train", "--cache", cache_fp16, "--output-dir", whole, *ARGUMENTS)
    train = ("train", "--cache", cache_fp16, "--output-dir", killed, *ARGUMENTS)
    _kill_after(3, *train)
    assert state(killed) == "no sign of life"
    _kill_after(8, *train, "--resume")
    done = cli.run("train", "--output-dir", killed, "--resume")

    assert "continuing from" in done.stderr
    assert _learned(_metrics(killed)) == _learned(_metrics(whole))
    assert len(_metrics(whole)) == STEPS
    name = "pytorch_lora_weights.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()
    for step in (2, 6, STEPS):
        states = [
            torch.load(run / "checkpoints" / f"step-{step:06d}" / "optimizer.pt")
            for run in (whole, killed)
        ]
        for parameter, tensors in states[0]["parameters"].items():
            for key, tensor in tensors.items():
                assert torch.equal(tensor, states[1]["parameters"][parameter][key]), (
                    step,
                    parameter,
                    key,
                )


def test_a_finished_run_is_neither_overwritten_nor_trained_again(cache_fp16, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    arguments = (
        "train", "--cache", cache_fp16, "--output-dir", run_dir, "--max-steps", 2,
        "--set", "lora.rank=2",
    )  # fmt: skip
    cli.run(*arguments)
    before = (run_dir / "pytorch_lora_weights.safetensors").read_bytes()
    assert f"wanlora train --output-dir {run_dir} --resume" in cli.refuses(*arguments)
    short = ("train", "--output-dir", run_dir, "--resume")
    again = cli.invoke(*short)
    assert again.exit_code == 0, again.output
    assert "nothing was trained" in again.output
    message = cli.refuses(*short, "--set", "lora.alpha=9")
    assert "lora.alpha: found 2.0, wanted 9.0" in message
    assert (run_dir / "pytorch_lora_weights.safetensors").read_bytes() == before

    # From another folder, with the cache elsewhere and more steps.
    shutil.copytree(cache_fp16, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    longer = cli.invoke(
        "train", "--output-dir", "run", "--resume", "--max-steps", 3, "--cache", "moved"
    )
    assert longer.exit_code == 0, longer.output
    assert [row["step"] for row in _metrics(run_dir)] == [0, 1, 2]
    recorded = tomllib.loads((run_dir / "config.toml").read_text())
    assert recorded["cache"] == str(tmp_path / "moved")
    assert (recorded["max_steps"], recorded["lora"]["rank"]) == (3, 2)


def test_a_run_keeps_its_attention_kernel(cache_fp16, tmp_path, caplog):
    run_dir = tmp_path / "run"
    first = (
        "train", "--cache", cache_fp16, "--output-dir", run_dir, "--set", "lora.rank=2",
        "--set", "validation.every=0", "--set", "trackers=[]", "--set", "attention=math",
    )  # fmt: skip
    assert cli.invoke(*first, "--max-steps", 1).exit_code == 0
    head = (run_dir / "config.toml").read_text().split("\n\n")[0]
    chosen = re.search(r"# attention: (math,.* [0-9.]+ ms)", head)
    assert chosen
    assert chosen[1] in (run_dir / "README.md").read_text()

    def go_on(steps, kernel):
        caplog.clear()
        done = cli.invoke(
            "train", "--output-dir", run_dir, "--resume", "--max-steps", steps, "--set",
            f"attention={kernel}",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        names = ("wanlora.training.kernel_probe", "wanlora.commands.train.kernel")
        return [record.message for record in caplog.records if record.name in names]

    def kernels_in(message):
        return re.findall(r"\b(?:math|flash|cudnn)\b", message)

    [choice] = go_on(2, "auto")
    assert "math" in kernels_in(choice)
    assert kernels_in(go_on(3, "flash")[1]) == ["flash", "math"]  # not bit for bit
    state = run_dir / "checkpoints" / "step-000003" / "state.json"
    moved = json.loads(state.read_text()) | {"attention": "cudnn"}  # from a machine with a GPU
    state.write_text(json.dumps(moved))
    refusal, _, change = go_on(4, "auto")
    assert "attention=cudnn" in refusal
    assert "--set" not in refusal  # auto is set already
    assert kernels_in(change) == ["flash", "cudnn"]
    kernels = [row["attention"] for row in _metrics(run_dir)]
    assert kernels == ["math", "math", "flash", "flash"]


def test_a_run_keeps_its_shift(cache_fp16, tmp_path, caplog):
    """Also if a newer release has another default for the size of the clips."""
    run_dir = tmp_path / "run"
    done = cli.invoke(
        "train", "--cache", cache_fp16, "--output-dir", run_dir, "--set", "lora.rank=2",
        "--set", "validation.every=0", "--set", "trackers=[]", "--max-steps", 1,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    file = run_dir / "checkpoints" / "step-000001" / "state.json"
    state = json.loads(file.read_text())
    assert state["facts"]["shift"] == "3.0"

    def go_on(shift, *more):
        facts = {key: value for key, value in state["facts"].items() if key != "shift"}
        facts |= {"shift": shift} if shift else {}
        file.write_text(json.dumps(state | {"facts": facts}))
        caplog.clear()
        done = cli.invoke("train", "--output-dir", run_dir, "--resume", "--max-steps", 1, *more)
        return done, caplog.text

    done, log = go_on("4.5")
    assert (done.exit_code, "shift 4.5 " in log) == (0, True)
    refused, _ = go_on("4.5", "--set", "flow.shift=5")
    assert (refused.exit_code, "flow.shift: found 4.5, wanted 5.0" in refused.output) == (1, True)
    done, log = go_on(None)  # a run of 0.1.0
    assert (done.exit_code, "shift 3 " in log) == (0, True)


def test_a_checkpoint_with_a_missing_tensor_is_refused_by_name(cache_fp16, tmp_path):
    import safetensors.torch

    run_dir = tmp_path / "run"
    arguments = (
        "train", "--cache", cache_fp16, "--output-dir", run_dir, "--set", "lora.rank=2",
    )  # fmt: skip
    assert cli.invoke(*arguments, "--max-steps", 1).exit_code == 0
    file = run_dir / "checkpoints" / "step-000001" / "pytorch_lora_weights.safetensors"
    with safetensors.safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = safetensors.torch.load_file(file)
    lost = min(tensors)
    del tensors[lost]
    safetensors.torch.save_file(tensors, file, header)
    message = cli.refuses(*arguments, "--max-steps", 2, "--resume")
    module, _, matrix = lost.removeprefix("transformer.").removesuffix(".weight").rpartition(".")
    assert f"{module} has no {matrix}" in message
    assert f"--init-adapter {run_dir}" in message  # there is no checkpoint before it


@pytest.mark.parametrize("victim", ["optimizer.pt", "state.json"])
def test_a_truncated_checkpoint_file_is_refused(cache_fp16, tmp_path, victim):
    run_dir = tmp_path / "run"
    arguments = (
        "train", "--cache", cache_fp16, "--output-dir", run_dir, "--set", "lora.rank=2",
    )  # fmt: skip
    assert cli.invoke(*arguments, "--max-steps", 1).exit_code == 0
    file = run_dir / "checkpoints" / "step-000001" / victim
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    message = cli.refuses(*arguments, "--max-steps", 2, "--resume")
    assert "cannot be continued" in message


def test_a_run_continues_without_the_adapter_that_it_started_from(cache_fp16, tmp_path):
    config = TrainConfig(
        output_dir=tmp_path / "run", cache=cache_fp16, init_adapter=tmp_path / "gone", resume=True
    )
    with pytest.raises(AdapterError, match="gone"):
        preflight.check(config)
    publish.publish_checkpoint(config.output_dir, 5, lambda folder: None, keep=0)
    preflight.check(config)
