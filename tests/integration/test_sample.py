"""`wanlora sample` against plain diffusers, and what it refuses."""

import json
import shutil

import av
import numpy as np
import pytest
import torch

from tests.support.diffusers_video import plain_diffusers
from tests.support.models import random_tensors
from wanlora import sample
from wanlora.config import SampleConfig
from wanlora.errors import AdapterError, ConfigError, DeviceError
from wanlora.wan import pipeline as wan
from wanlora.wan.adapter import ADAPTER_FILE, LoraShape, add_adapter, read_adapter, save_adapter
from wanlora.wan.transformer import load_transformer

CPU = torch.device("cpu")
PROMPT = "a red person waving on a white background"
SIZE = {"num_frames": 9, "height": 32, "width": 48, "steps": 3}
SETTINGS = wan.VideoSettings(**SIZE, guidance_scale=3.0, negative_prompt="")


@pytest.fixture(scope="module")
def run_folder(micro_folder, tmp_path_factory):
    """A run's folder with an adapter that changes the output."""
    folder = tmp_path_factory.mktemp("run")
    transformer = load_transformer(micro_folder, dtype=torch.float32, device=CPU)
    shape = LoraShape(rank=4, alpha=8.0)
    parameters = add_adapter(transformer, shape, seed=0)
    save_adapter(folder, random_tensors(parameters), shape, provenance={"model": "micro"})
    return folder


def theirs(micro_folder, adapter=None, seed=0) -> np.ndarray:
    return plain_diffusers(
        micro_folder, PROMPT, adapter, seed=seed, num_frames=9, height=32, width=48,
        num_inference_steps=3, guidance_scale=3.0,
    )  # fmt: skip


def ours(micro_folder, adapter=None, seed=0, scale=1.0) -> np.ndarray:
    pipeline = wan.load_pipeline(micro_folder, dtype=torch.float32, device=CPU)
    if adapter:
        wan.load_adapter(pipeline, read_adapter(adapter), scale=scale)
    return wan.generate(pipeline, PROMPT, SETTINGS, seed=seed)


def config(tmp_path, **values) -> SampleConfig:
    defaults = {"model": "micro", "prompt": (PROMPT,), "output_dir": tmp_path / "out", **SIZE}
    return SampleConfig(**(defaults | values))


def test_the_base_model_gives_plain_diffusers_video(micro_folder):
    assert np.array_equal(ours(micro_folder, seed=3), theirs(micro_folder, seed=3))


def test_an_adapter_gives_plain_diffusers_video_and_not_the_bases(micro_folder, run_folder):
    adapted = ours(micro_folder, run_folder)
    assert np.array_equal(adapted, theirs(micro_folder, run_folder))
    base = ours(micro_folder)
    assert np.abs(adapted.astype(int) - base).mean() > 1
    assert np.array_equal(ours(micro_folder, run_folder, scale=0.0), base)
    half = ours(micro_folder, run_folder, scale=0.5)
    assert not np.array_equal(half, base)
    assert not np.array_equal(half, adapted)


def test_videos_are_written_with_a_record_of_how_they_were_made(tmp_path, run_folder, micro_home):
    result = sample.run(
        config(tmp_path, model=None, adapter=run_folder, prompt=(PROMPT, "a dog"), num_videos=2,
               seed=5, negative_prompt="blue")
    )  # fmt: skip
    names = [path.removeprefix(f"{tmp_path}/out/") for path in result.videos]
    assert names == [
        "000-a-red-person-waving-on-a-white-background-seed5.mp4",
        "001-a-red-person-waving-on-a-white-background-seed6.mp4",
        "002-a-dog-seed5.mp4",
        "003-a-dog-seed6.mp4",
    ]
    assert result.exit_code == 0
    assert all(any(path in line for line in result.lines()) for path in result.videos)
    with av.open(result.videos[3]) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.height, stream.width) == (9, 32, 48)
    record = json.loads((tmp_path / "out" / names[3].replace(".mp4", ".json")).read_text())
    assert record["prompt"] == "a dog"
    assert record["seed"] == 6
    assert record["model"] == "micro"  # from the adapter's header
    assert record["adapter"] == str(run_folder / ADAPTER_FILE)
    assert len(record["adapter_sha256"]) == 64
    assert record["steps"] == 3
    assert record["negative_prompt"] == "blue"
    assert record["versions"]["diffusers"]


def test_sizes_and_steps_default_to_the_variants(micro_home):
    from wanlora.wan.variants import VARIANTS

    settings = sample.video_settings(SampleConfig(prompt=("a dog",)), VARIANTS["t2v-1.3b"])
    assert (settings.num_frames, settings.height, settings.width) == (81, 480, 832)
    assert (settings.steps, settings.guidance_scale) == (50, 5.0)
    assert settings.negative_prompt.startswith("色调艳丽")


def test_an_existing_video_is_replaced_only_when_told(tmp_path, micro_home):
    file = tmp_path / "clip.mp4"
    file.write_bytes(b"precious")
    with pytest.raises(ConfigError, match="--overwrite"):
        sample.run(config(tmp_path, output=file))
    assert file.read_bytes() == b"precious"
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"other\.json would be replaced"):
        sample.run(config(tmp_path, output=tmp_path / "other.mp4"))
    (tmp_path / "other.json").unlink()
    result = sample.run(config(tmp_path, output=file, overwrite=True))
    assert result.videos == [str(file)]
    assert file.stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.json", "clip.mp4"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_frames": 16}, r"16 frames; expected 4k\+1"),
        ({"height": 40}, "height 40 px"),
        ({"output": "x.mp4", "num_videos": 2}, "one file for 2 videos"),
        ({"output": "x.gif"}, r"ending in \.mp4"),
        ({"prompt": ("a dog " * 600,)}, "1201 tokens"),
    ],
)
def test_what_diffusers_would_round_or_cut_is_refused(tmp_path, micro_home, values, message):
    with pytest.raises(ConfigError, match=message):
        sample.run(config(tmp_path, **values))
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_for_another_model_is_refused(tmp_path, run_folder, micro_home):
    tensors = {
        name: torch.zeros(4, 1536) if "lora_A" in name else torch.zeros(1536, 4)
        for name in read_adapter(run_folder).tensors
    }
    save_adapter(tmp_path / "run", tensors, LoraShape(4, 4.0), provenance={})
    with pytest.raises(
        AdapterError, match=r"another model: .*expected \(4, 128\), found \(4, 1536\)"
    ):
        sample.run(config(tmp_path, adapter=tmp_path / "run"))


def test_a_real_model_on_a_cpu_is_refused_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="--device cpu"):
        sample.run(config(tmp_path, model=None))


def test_an_adapter_file_beside_another_is_loaded_by_name(micro_folder, run_folder, tmp_path):
    """diffusers guesses when a folder holds two files; the one asked for must be the one used."""
    shutil.copy(run_folder / ADAPTER_FILE, tmp_path / "mine.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"not it")
    adapted = ours(micro_folder, tmp_path / "mine.safetensors")
    assert np.array_equal(adapted, ours(micro_folder, run_folder))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A dog, running!", "a-dog-running"),
        ("../../etc/passwd", "etc-passwd"),
        ("", "empty"),
        ("跑步 的 人", "跑步-的-人"),
        ("word " * 40, "word-word-word-word-word-word-word-word-word-wor"),
    ],
)
def test_a_prompt_becomes_a_harmless_file_name(prompt, expected):
    assert sample.slug(prompt) == expected
