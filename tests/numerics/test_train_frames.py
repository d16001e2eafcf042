"""Training on the first frames of longer clips: exactly the latents of the shorter clip."""

import json

import numpy as np
import pytest
import torch

from tests.support import cli
from wanlora.commands.train.opening_data import open_data
from wanlora.commands.train.preflight import select
from wanlora.config import TrainConfig
from wanlora.core.buckets import Bucket
from wanlora.store.views import read_view
from wanlora.wan.variants import VARIANTS


def write(folder, name, frames):
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / "a.npz", frames=frames)
    (folder / name).write_text(json.dumps({"npz": "a.npz", "prompt": "a walk"}) + "\n")
    return folder / name


@pytest.fixture(scope="module")
def frames():
    small = np.random.default_rng(3).integers(0, 256, (17, 4, 6, 3), dtype=np.uint8)
    return small.repeat(8, axis=1).repeat(8, axis=2)


@pytest.mark.parametrize("num_frames", [1, 5, 13])
def test_a_prefix_of_the_cache_is_the_latents_of_the_shorter_clip_bit_for_bit(
    frames, num_frames, micro_home, tmp_path
):  # fmt: skip
    sources = {}
    for name, length in (("long", 17), ("short", num_frames)):
        manifest = write(tmp_path / f"data-{name}", "train.jsonl", frames[:length])
        cache = tmp_path / name
        made = cli.invoke("cache-latents", "--manifest", manifest, "--cache", cache, "--model",
                          "micro", "--device", "cpu", "--set", "store.dtype=float32")  # fmt: skip
        assert made.exit_code == 0, made.output
        shorter = num_frames if name == "long" else None
        config = TrainConfig(cache=cache, train_frames=shorter, validation={"every": 0})
        sources[name] = open_data(config, VARIANTS["micro"], select(config)).source
    batches = {name: source.read(0, (0,)) for name, source in sources.items()}
    assert list(sources["long"].clips) == [Bucket(num_frames, 32, 48)]
    assert torch.equal(batches["long"].latents, batches["short"].latents)
    assert torch.equal(batches["long"].noise, batches["short"].noise)
    assert batches["long"].latents.shape[2] == 1 + (num_frames - 1) // 4


def test_a_run_on_prefixes_trains_and_shorter_clips_stay_whole(cache_fp16, tmp_path):
    config = TrainConfig(cache=cache_fp16, train_frames=81)
    data = open_data(config, VARIANTS["micro"], select(config))
    assert data.source.read(0, (0,)).latents.shape[2] == 3
    assert data.view.sha256 == read_view(cache_fp16, "default").sha256
    done = cli.invoke(
        "train", "--cache", cache_fp16, "--output-dir", tmp_path / "run", "--max-steps", 1,
        "--device", "cpu", "--set", "train_frames=5", "--set", "validation.every=0",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "use 5 or 9" in cli.refuses("train", "--set", "train_frames=7", exit_code=2)
