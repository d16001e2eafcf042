"""Weights of clips, from the manifest to the order of training."""

import json
from pathlib import Path

import pytest

from tests.support.caches import write_npz_clips
from wanlora.adapters.file import read_adapter
from wanlora.commands import cache_latents, train
from wanlora.config import CacheLatentsConfig, TrainConfig
from wanlora.errors import RunError
from wanlora.runs.run_folder import METRICS_NAME, read_rows
from wanlora.store.views import read_view


@pytest.fixture(scope="module")
def cached(tmp_path_factory, micro_home) -> CacheLatentsConfig:
    """Four clips: one of weight 2.5, one on two lines, two plain ones."""
    folder = tmp_path_factory.mktemp("weights")
    manifest = write_npz_clips(folder / "data", num_clips=4, size=(5, 32, 32))
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines[0] |= {"num_repeats": 2.5, "activity": "walking"}
    for line in lines[1:]:
        line["activity"] = "sitting"
    text = "".join(json.dumps(line) + "\n" for line in [*lines, lines[1]])
    manifest.write_text(text)
    config = CacheLatentsConfig(manifest=(manifest,), cache=folder / "cache", model="micro")
    planned = cache_latents.run(config.model_copy(update={"dry_run": True}))
    assert planned.draws == {"sitting": 4 / 6.5, "walking": 2.5 / 6.5}
    assert any("walking 38 %" in line for line in planned.lines())
    cache_latents.run(config)
    return config


def run(cached: CacheLatentsConfig, folder: Path, **values) -> Path:
    settings = {
        "cache": cached.cache, "output_dir": folder, "max_steps": 4, "save_steps": 2,
        "device": "cpu", "eager": "on", "lora": {"rank": 1, "targets": "attention"},
        "validation": {"every": 0}, "trackers": (), "optimizer": {"warmup_steps": 0},
        "clip_weights": {"walking": 2.0},
    }  # fmt: skip
    train.run(TrainConfig(**(settings | values)))
    return folder


def test_the_view_has_the_weights_of_the_manifest(cached):
    weights = [clip.weight for clip in read_view(cached.cache, "default").clips]
    assert sorted(weights) == [1.0, 1.0, 2.0, 2.5]


def test_a_weighted_run_resumes_bit_for_bit_and_refuses_other_weights(cached, tmp_path, caplog):
    with caplog.at_level("INFO"):
        whole = run(cached, tmp_path / "whole")
    assert "walking 56 %, sitting 44 %" in caplog.text  # 5 of 9
    parts = run(cached, tmp_path / "parts", max_steps=2)
    with pytest.raises(RunError, match=r"clip_weights\.walking"):
        run(cached, parts, clip_weights={"walking": 3.0}, resume=True)
    run(cached, parts, resume=True)
    losses = [[row["loss"] for row in read_rows(each, METRICS_NAME)] for each in (whole, parts)]
    assert losses[0] == losses[1]
    tensors = [read_adapter(each).tensors for each in (whole, parts)]
    assert all((tensors[1][name] == tensor).all() for name, tensor in tensors[0].items())
    even = run(cached, tmp_path / "even", clip_weights={})
    assert [row["loss"] for row in read_rows(even, METRICS_NAME)] != losses[0]
