"""Still images and clips of several lengths, from their files to an adapter, in one run."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from tests.support import cli
from tests.support.videos import write_video
from wanlora.commands.train import opening, preflight
from wanlora.config import TrainConfig
from wanlora.core.buckets import Bucket
from wanlora.errors import ConfigError
from wanlora.training.batch_sizes import BatchSize
from wanlora.training.predict import predict

NAME = "pytorch_lora_weights.safetensors"
STILL, SHORT, LONG = (Bucket(frames, 96, 96) for frames in (1, 9, 17))
# At micro's width a clip of 17 frames costs what four images do, or two clips of 9.
SIZES = {STILL: BatchSize(2, 4), SHORT: BatchSize(2, 2), LONG: BatchSize(2, 1)}
SETTINGS = {
    "batch_by": "cost",
    "batch_size": 2,
    "lora": {"rank": 2, "targets": "attention"},
    "optimizer": {"warmup_steps": 1},
    "validation": {"every": 0},
    "trackers": (),
}
BATCHES = (
    "--batch-by", "cost", "--batch-size", 2, "--set", "lora.rank=2",
    "--set", "lora.targets=attention",
)  # fmt: skip
FLAGS = (
    *BATCHES, "--set", "optimizer.warmup_steps=1", "--set", "validation.every=0",
    "--set", "trackers=[]",
)  # fmt: skip
RUN = ("--num-epochs", 2, "--seed", 3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, micro_home):
    """Five images, a video of 9 frames and two of 17, in the files people have."""
    folder = tmp_path_factory.mktemp("mixed")
    raw = folder / "raw"
    random = np.random.default_rng(0)
    for name, num_frames in (("short", 9), ("long-a", 17), ("long-b", 17)):
        write_video(raw / f"{name}.mp4", num_frames=num_frames, fps=16, height=96, width=96)
        (raw / f"{name}.txt").write_text(f"columns, {name}")
    for index, suffix in enumerate(("png", "jpg", "webp", "png", "jpg")):
        pixels = random.integers(0, 256, (6, 8, 3), np.uint8).repeat(20, 0).repeat(20, 1)
        Image.fromarray(pixels).save(raw / f"still-{index}.{suffix}")
        (raw / f"still-{index}.txt").write_text(f"blocks {index}")
    for command in (
        ("prepare", raw, "--output", folder / "data", "--num-frames", 17, "--height", 96,
         "--width", 96, "--val-fraction", 0, "--set", "min_frames=5"),
        ("cache-latents", "--manifest", folder / "data", "--cache", folder / "cache",
         "--model", "micro", "--set", "store.dtype=float32", "--set", "text_dtype=float32"),
    ):  # fmt: skip
        done = cli.invoke(*command)
        assert done.exit_code == 0, done.output
    return folder / "cache"


def train(cache, run_dir, *arguments):
    done = cli.invoke("train", "--cache", cache, "--output-dir", run_dir, *FLAGS, *arguments)
    assert done.exit_code == 0, done.output
    return rows_of(run_dir)


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run_dir(cache, tmp_path_factory):
    """A run of two epochs: long clips, images, long clips, images."""
    folder = tmp_path_factory.mktemp("mixed-run")
    train(cache, folder, *RUN)
    return folder


def test_an_epoch_of_mixed_lengths_has_steps_of_equal_cost(run_dir):
    rows = rows_of(run_dir)
    # 5 images, 8 a step; a short clip, 4 a step; 2 long ones, 2 a step: 1.875 steps an epoch.
    assert len(rows) == 4
    assert {row["bucket"] for row in rows} >= {str(STILL), str(LONG)}
    for row in rows:
        size = next(size for bucket, size in SIZES.items() if str(bucket) == row["bucket"])
        assert row["clips"] == size.global_batch
    done = np.array([row["tflops"] * row["s_per_step"] for row in rows])
    assert done.max() / done.min() < 1.3
    card = (run_dir / "README.md").read_text()
    assert f"8 of {STILL}, 4 of {SHORT}, 2 of {LONG}" in card


def test_the_loss_of_a_step_is_the_mean_over_its_clips(cache, tmp_path, caplog):
    """Against one plain pass over all slots at once; the seed's first step is of images."""
    (row,) = train(cache, tmp_path / "run", "--max-steps", 1, "--seed", 1)
    assert row["bucket"] == str(STILL)
    assert f"{STILL}: 8 of 5, 2 at once" in caplog.text
    config = TrainConfig(cache=cache, output_dir=tmp_path / "plain", seed=1, **SETTINGS)
    opened = opening.open_session(config, preflight.check(config))
    batch = opened.data.source.read(0, range(8))
    assert len(set(batch.clip_ids[:5])) == 5  # every image, then the next epoch's first
    model = opened.model
    prediction, target = predict(model.transformer, batch, model.device, model.dtype)
    loss = (prediction - target).square().mean()
    loss.backward()
    gradients = [p.grad for p in model.transformer.parameters() if p.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_a_mixed_run_continues_with_the_same_bits(cache, run_dir, tmp_path):
    whole = rows_of(run_dir)
    train(cache, tmp_path, *RUN, "--max-steps", 2)
    assert len({row["bucket"] for row in whole[2:]}) > 1
    parts = train(cache, tmp_path, *RUN, "--resume")
    assert [(r["loss"], r["grad_norm"]) for r in parts] == [
        (r["loss"], r["grad_norm"]) for r in whole
    ]
    assert (run_dir / NAME).read_bytes() == (tmp_path / NAME).read_bytes()


def test_what_steps_are_equal_in_may_not_change_when_a_run_continues(cache, run_dir):
    message = cli.refuses(
        "train", "--cache", cache, "--output-dir", run_dir, *FLAGS, *RUN, "--batch-by", "clips",
        "--resume",
    )  # fmt: skip
    assert "batch_by" in message


def test_processes_that_cannot_share_a_step_evenly_are_refused():
    with pytest.raises(ConfigError, match=r"8 clips \(batch_size 2 .* a multiple of 3"):
        opening.require_even_shares(2, 4, 3)


def test_estimate_says_what_a_step_of_each_size_has_and_takes(cache):
    arguments = ("estimate", "--cache", cache, "--device", "h100", *BATCHES)
    found = json.loads(cli.invoke(*arguments, "--json").stdout)
    assert {name: batch["clips"] for name, batch in found["batches"].items()} == {
        str(bucket): size.global_batch for bucket, size in SIZES.items()
    }
    mean = np.average(
        [batch["tflop"] for batch in found["batches"].values()], weights=[5 / 8, 1 / 4, 2 / 2]
    )
    assert found["tflop_per_step"] == pytest.approx(mean)
    assert found["clips_per_step"] == pytest.approx(8 / 1.875)
    assert found["steps"] == 19
    text = cli.invoke(*arguments).stdout
    assert "clips per step" in text
    assert "a mean step" in text


@pytest.mark.slow
def test_two_processes_train_mixed_lengths_as_one_does(cache, tmp_path):
    more = ("--max-steps", 5, "--gradient-accumulation-steps", 2)
    one = train(cache, tmp_path / "one", *more)
    assert len({row["bucket"] for row in one}) > 1
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "wanlora",
         "train", "--cache", cache, "--output-dir", tmp_path / "two", *map(str, (*FLAGS, *more))],
        env=os.environ | cli.ENVIRONMENT, capture_output=True, timeout=300, check=True,
    )  # fmt: skip
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    np.testing.assert_allclose(
        [json.loads(line)["loss"] for line in lines], [row["loss"] for row in one], rtol=1e-6
    )
    ours, theirs = (safetensors.torch.load_file(tmp_path / n / NAME) for n in ("one", "two"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(tensor, ours[name], rtol=0, atol=1e-5)
