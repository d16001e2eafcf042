"""What a run does beside its steps: validation, best, averages, signals, other starts."""

import json
import shlex
import signal
import sys
import time

import pytest
import safetensors
import torch

from tests.support import cli
from wanlora.store.reader import StoreReader
from wanlora.store.views import read_view

NAME = "pytorch_lora_weights.safetensors"
SMALL = (
    "--set", "lora.rank=2", "--set", "lora.targets=attention", "--set", "optimizer.warmup_steps=1",
    "--learning-rate", "1e-3",
)  # fmt: skip
QUICK = ("--set", "validation.num_clips=3", "--set", "validation.num_sigmas=2")


@pytest.fixture
def cache(held_out_cache):
    """Nine clips of three activities, three of them held out."""
    return held_out_cache


def _train(cache, run_dir, *arguments, exit_code=0):
    done = cli.invoke("train", "--cache", cache, "--output-dir", run_dir, *SMALL, *arguments)
    assert done.exit_code == exit_code, done.output
    return done.output


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _tensors(path):
    with safetensors.safe_open(path / NAME, "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118


def test_validation_is_paired_with_the_base_and_keeps_the_best(cache, tmp_path):
    _train(cache, tmp_path, "--max-steps", 6, *QUICK, "--set", "validation.every=2")
    rows = _rows(tmp_path / "validation.jsonl")
    assert [(row["step"], row["split"]) for row in rows] == [
        (step, split) for step in (2, 4, 6) for split in ("val", "train")
    ]
    for row in rows:
        assert row["difference"] == pytest.approx(row["mean"] - row["base_mean"])
        assert row["ci95"][0] <= row["difference"] <= row["ci95"][1]
        assert sorted(row["per_activity"]) == ["clap", "sit", "walk"]
        assert len(row["per_sigma"]) == 2
    held_out = {row["step"]: row["mean"] for row in rows if row["split"] == "val"}
    assert len({row["base_mean"] for row in rows if row["split"] == "val"}) == 1
    best = min(held_out, key=held_out.get)
    tensors, header = _tensors(tmp_path / "best")
    assert header["wanlora.step"] == str(best)
    assert tensors.keys() == _tensors(tmp_path)[0].keys()


def test_an_adapter_that_learns_nothing_differs_in_nothing(cache, tmp_path):
    """With steps too small to change a prediction, every paired difference is exactly 0."""
    _train(
        cache, tmp_path, "--max-steps", 2, *QUICK, "--learning-rate", "1e-30", "--set",
        "optimizer.weight_decay=0",
    )  # fmt: skip
    for row in _rows(tmp_path / "validation.jsonl"):
        assert (row["difference"], row["ci95"]) == (0.0, [0.0, 0.0])


def test_no_new_best_for_long_enough_stops_the_run(cache, tmp_path):
    output = _train(
        cache, tmp_path, "--max-steps", 9, *QUICK, "--learning-rate", "1e-30",
        "--set", "validation.every=1", "--set", "validation.patience=2",
    )  # fmt: skip
    assert "best in 2 validations" in output
    assert len(_rows(tmp_path / "metrics.jsonl")) == 3


def test_the_moving_average_is_that_of_the_checkpoints(cache, tmp_path):
    _train(
        cache, tmp_path, "--max-steps", 3, "--save-steps", 1, "--set", "ema_decay=0.5",
        "--set", "keep_checkpoints=0", "--set", "validation.every=0",
    )  # fmt: skip
    steps = [_tensors(tmp_path / "checkpoints" / f"step-00000{n}")[0] for n in (1, 2, 3)]
    average = _tensors(tmp_path / "ema")[0]
    for name, tensor in average.items():
        # B starts at 0, so its average needs no knowledge of the start.
        if "lora_B" in name:
            expected = 0.125 * steps[0][name] + 0.25 * steps[1][name] + 0.5 * steps[2][name]
            torch.testing.assert_close(tensor, expected)


def test_a_run_starts_from_another_adapter_of_its_shape_only(cache, tmp_path):
    first = tmp_path / "first"
    _train(cache, first, "--max-steps", 2, "--set", "validation.every=0")
    again = ("--set", "validation.every=0", "--set", f"init_adapter={first}")
    _train(
        cache, tmp_path / "second", "--max-steps", 1, "--learning-rate", "1e-30", *again,
        "--set", "optimizer.weight_decay=0",
    )  # fmt: skip
    start, end = _tensors(tmp_path / "second")[0], _tensors(first)[0]
    assert all(torch.equal(start[name], end[name]) for name in end)
    message = cli.refuses(
        "train", "--cache", cache, "--output-dir", tmp_path / "third", *SMALL, *again,
        "--set", "lora.rank=3",
    )  # fmt: skip
    assert "transformer.r: found 2, wanted 3" in message
    assert not (tmp_path / "third" / NAME).exists()


def test_a_run_starts_from_another_tools_adapter_where_its_scale_is_the_runs(cache, tmp_path):
    first, theirs = tmp_path / "first", tmp_path / "theirs.safetensors"
    _train(cache, first, "--max-steps", 2, "--set", "validation.every=0")
    done = cli.invoke("export", "--adapter", first, "--format", "comfyui", "--output", theirs)
    assert done.exit_code == 0, done.output
    still = ("--set", "validation.every=0", "--learning-rate", "1e-30", "--set",
             "optimizer.weight_decay=0", "--set", f"init_adapter={theirs}")  # fmt: skip
    _train(cache, tmp_path / "second", "--max-steps", 1, *still)
    start, end = _tensors(tmp_path / "second")[0], _tensors(first)[0]
    assert all(torch.equal(start[name], end[name]) for name in end)
    message = cli.refuses(
        "train", "--cache", cache, "--output-dir", tmp_path / "third", *SMALL, *still,
        "--set", "lora.rslora=true",
    )  # fmt: skip
    assert "B A: found [1.0], wanted 1.41" in message


def test_prodigy_needs_no_learning_rate_and_resumes_bit_for_bit(cache, tmp_path):
    pytest.importorskip("prodigyopt")
    arguments = ("--set", "optimizer.name=prodigy", "--set", "validation.every=0")
    common = (
        "train", "--cache", cache, "--set", "lora.rank=2", "--set", "optimizer.warmup_steps=0",
        *arguments, "--output-dir",
    )  # fmt: skip
    assert cli.invoke(*common, tmp_path / "whole", "--max-steps", 4).exit_code == 0
    assert cli.invoke(*common, tmp_path / "parts", "--max-steps", 2).exit_code == 0
    assert cli.invoke(*common, tmp_path / "parts", "--max-steps", 4, "--resume").exit_code == 0
    whole, parts = _tensors(tmp_path / "whole")[0], _tensors(tmp_path / "parts")[0]
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert _rows(tmp_path / "whole" / "metrics.jsonl")[0]["lr"] == 1.0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_after_the_step_and_the_run_continues(cache, tmp_path, name):
    arguments = (
        "train", "--cache", cache, "--output-dir", tmp_path, *SMALL, "--max-steps", 400,
        "--set", "validation.every=0",
    )  # fmt: skip
    process = cli.start(*arguments)
    deadline = time.monotonic() + 300
    while not (tmp_path / "metrics.jsonl").exists() or not _rows(tmp_path / "metrics.jsonl"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    assert process.wait(timeout=300) == 128 + getattr(signal, name)
    done = len(_rows(tmp_path / "metrics.jsonl"))
    assert (tmp_path / "checkpoints" / f"step-{done:06d}").is_dir()
    assert 0 < done < 400


@pytest.mark.parametrize("share", [0.5, 1.5], ids=["adapter", "optimizer"])
def test_a_disk_that_fills_up_leaves_the_checkpoint_before_it(cache, tmp_path, share):
    import resource

    _train(cache, tmp_path, "--max-steps", 1, "--set", "validation.every=0")
    before = (tmp_path / NAME).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(before)), limits[1]))
    try:
        message = cli.refuses(
            "train", "--cache", cache, "--output-dir", tmp_path, *SMALL, "--max-steps", 2,
            "--resume", "--set", "validation.every=0",
        )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "step-000002: File too large" in message
    assert f"wanlora train --output-dir {tmp_path} --resume" in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert (tmp_path / NAME).read_bytes() == before


def test_a_checkpoint_at_the_end_of_every_epoch(cache, tmp_path):
    _train(
        cache, tmp_path, "--num-epochs", 2, "--gradient-accumulation-steps", 4,
        "--set", "save_every_epoch=true", "--set", "keep_checkpoints=0",
        "--set", "validation.every=0",
    )  # fmt: skip
    # Six clips, four a step: epochs end within steps 2 and 3.
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000003"]


def test_saving_by_time_changes_no_bit_and_keeps_the_newest_checkpoints(cache, tmp_path):
    common = ("--max-steps", 6, "--set", "validation.every=0", "--set", "trackers=[]")
    _train(cache, tmp_path / "a", *common, "--save-minutes", 0)
    # A request reaches the processes with the next step: every second step saves.
    _train(cache, tmp_path / "b", *common, "--save-minutes", 1e-9, "--keep-checkpoints", 2)
    saved = [sorted(p.name for p in (tmp_path / run / "checkpoints").iterdir()) for run in "ab"]
    assert saved == [["step-000006"], ["step-000004", "step-000006"]]
    assert (tmp_path / "a" / NAME).read_bytes() == (tmp_path / "b" / NAME).read_bytes()
    losses = [[row["loss"] for row in _rows(tmp_path / run / "metrics.jsonl")] for run in "ab"]
    assert losses[0] == losses[1]
    _train(cache, tmp_path / "b", "--max-steps", 7, *common[2:], "--resume", "--save-minutes", 1)


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_clip(cache, tmp_path):
    _train(cache, tmp_path, "--max-steps", 1, "--set", "validation.every=0", "--set",
           "optimizer.max_grad_norm=0", "--learning-rate", "1e30")  # fmt: skip
    before = (tmp_path / NAME).read_bytes()
    message = cli.refuses(
        "train", "--cache", cache, "--output-dir", tmp_path, *SMALL, "--max-steps", 9, "--resume",
        "--set", "validation.every=0", "--set", "optimizer.max_grad_norm=0",
        "--learning-rate", "1e30",
    )  # fmt: skip
    assert "is not finite" in message
    assert "clip-0" in message
    assert "at sigma 0." in message
    assert (tmp_path / NAME).read_bytes() == before
    assert len(_rows(tmp_path / "metrics.jsonl")) == 1


def test_deterministic_algorithms_are_used_when_asked_for(cache, tmp_path):
    arguments = ("train", "--cache", cache, *SMALL, "--max-steps", 2, "--deterministic")
    cli.run(*arguments, "--set", "validation.every=0", "--output-dir", tmp_path)
    assert "deterministic = true" in (tmp_path / "config.toml").read_text()


def test_previews_are_latents_and_rough_pictures(cache, tmp_path):
    _train(
        cache, tmp_path, "--max-steps", 2, "--set", "validation.every=0",
        "--set", "previews.every=2", "--set", "previews.steps=2", "--set", "previews.num_prompts=1",
    )  # fmt: skip
    folder = tmp_path / "previews" / "step-000002"
    assert sorted(path.name for path in folder.iterdir()) == ["00.gif", "00.safetensors"]
    with safetensors.safe_open(folder / "00.safetensors", "pt") as opened:
        assert opened.get_tensor("latents").shape == (16, 2, 4, 4)
    # The run's root still holds one adapter and no other safetensors file.
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [NAME]


def test_every_logged_step_says_how_fast_it_was(cache, tmp_path):
    _train(cache, tmp_path, "--max-steps", 2, "--set", "validation.every=0")
    for row in _rows(tmp_path / "metrics.jsonl"):
        assert {"step", "loss", "lr", "grad_norm", "clips_per_s", "data_wait_s"} <= row.keys()
        assert row["tflops"] > 0
        assert row["mfu"] is None  # no peak is known for a CPU
        assert 0 <= row["data_wait_pct"] <= 100
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert "<svg" in (tmp_path / "run.html").read_text()
    card = (tmp_path / "README.md").read_text()
    assert "base_model" not in card.split("---")[1]  # micro is no repository of the hub
    assert "clap" in card
    assert "wanlora sample --adapter" in card
    prompts = {view_prompt.prompt for view_prompt in read_view(cache, "default").validation_prompts}
    reader = StoreReader.of_view(cache, read_view(cache, "default"))
    keys = {clip.prompts[0] for clip in read_view(cache, "default").clips}
    real = prompts or set(reader.prompts(keys).values())
    assert shlex.split(card.split("```sh")[1].split("```")[0])[-1] in real
    assert str(tmp_path) not in card


def test_a_tracker_that_is_missing_is_refused_before_the_run_begins(cache, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    said = cli.refuses(
        "train", "--cache", cache, "--output-dir", tmp_path / "run",
        "--set", 'trackers=["wandb"]', exit_code=2,
    )  # fmt: skip
    assert "pip install wandb" in said
    assert not (tmp_path / "run").exists()
