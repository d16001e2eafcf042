"""`wanlora sample` against plain diffusers, and what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import cli
from tests.support.diffusers_video import plain_diffusers
from tests.support.models import random_tensors
from wanlora.adapters.attach import attach, read_scaled
from wanlora.adapters.file import LoraShape, read_adapter, save_adapter
from wanlora.adapters.header import ADAPTER_FILE
from wanlora.adapters.lora import add_adapter
from wanlora.commands import sample
from wanlora.commands.sample.preflight import plan
from wanlora.config import SampleConfig
from wanlora.errors import AdapterError, ConfigError, DeviceError, StoreError
from wanlora.store.captions import captions
from wanlora.store.reader import StoreReader
from wanlora.store.views import read_view
from wanlora.wan import pipeline as wan
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


@pytest.fixture(scope="module")
def other_folder(micro_folder, tmp_path_factory):
    """An adapter of another rank on other modules."""
    folder = tmp_path_factory.mktemp("odd=name")
    transformer = load_transformer(micro_folder, dtype=torch.float32, device=CPU)
    shape = LoraShape(rank=2, alpha=2.0, targets="attention")
    parameters = add_adapter(transformer, shape, seed=1)
    save_adapter(folder, random_tensors(parameters, seed=7), shape, provenance={"model": "micro"})
    return folder


def theirs(micro_folder, adapter=None, seed=0) -> np.ndarray:
    return plain_diffusers(
        micro_folder, PROMPT, adapter, seed=seed, num_frames=9, height=32, width=48,
        num_inference_steps=3, guidance_scale=3.0,
    )  # fmt: skip


def ours(micro_folder, adapter=None, seed=0, scale=1.0) -> np.ndarray:
    pipeline = wan.load_pipeline(micro_folder, dtype=torch.float32, device=CPU)
    if adapter:
        attach(pipeline.transformer, [read_scaled(f"{adapter}={scale}")])
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
        config(tmp_path, model=None, adapter=(str(run_folder),), prompt=(PROMPT, "a dog"),
               num_videos=2, seed=5, negative_prompt="blue")
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
    (adapter,) = record["adapters"]
    assert (adapter["path"], adapter["scale"]) == (str(run_folder / ADAPTER_FILE), 1.0)
    assert len(adapter["sha256"]) == 64
    assert record["steps"] == 3
    assert record["negative_prompt"] == "blue"
    assert record["versions"]["diffusers"]


def test_sizes_and_steps_default_to_the_variants(micro_home):
    from wanlora.commands.sample.preflight import video_size
    from wanlora.commands.sample.setup import video_settings
    from wanlora.wan.variants import VARIANTS

    variant = VARIANTS["t2v-1.3b"]
    settings = video_settings(variant, video_size(variant, []))
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
    with pytest.raises(ConfigError, match=r"other\.json"):
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
    with pytest.raises(AdapterError, match=r"expected \(4, 128\), found \(4, 1536\)"):
        sample.run(config(tmp_path, adapter=(str(tmp_path / "run"),)))


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


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # plain diffusers says it
def test_two_adapters_at_their_scales_give_plain_diffusers_video(
    micro_folder, run_folder, other_folder
):
    from diffusers import WanPipeline

    plain = WanPipeline.from_pretrained(micro_folder)
    plain.load_lora_weights(str(run_folder), adapter_name="a")
    plain.load_lora_weights(str(other_folder), adapter_name="b")
    plain.set_adapters(["a", "b"], [0.8, 1.0])
    pipeline = wan.load_pipeline(micro_folder, dtype=torch.float32, device=CPU)
    attach(pipeline.transformer, [read_scaled(f"{run_folder}=0.8"), read_scaled(str(other_folder))])
    both = wan.generate(pipeline, PROMPT, SETTINGS, seed=0)
    assert np.array_equal(both, wan.generate(plain, PROMPT, SETTINGS, seed=0))
    assert not np.array_equal(both, ours(micro_folder, run_folder, scale=0.8))
    with wan.base_alone(pipeline):
        assert np.array_equal(wan.generate(pipeline, PROMPT, SETTINGS, seed=0), ours(micro_folder))


def test_a_path_with_an_equals_sign_is_a_path_before_it_is_a_scale(other_folder, run_folder):
    assert "=" in other_folder.name
    assert read_scaled(str(other_folder)).scale == 1.0
    assert read_scaled(f"{other_folder}=-0.5").scale == -0.5
    for wrong in (f"{run_folder}=much", f"{run_folder}=nan", f"{run_folder}="):
        with pytest.raises(AdapterError, match="expected PATH or PATH=SCALE"):
            read_scaled(wrong)


def test_a_stopped_run_is_continued_with_the_videos_that_are_missing(tmp_path, micro_home):
    asked = {"prompt": ("a dog", "a cat"), "num_videos": 2}
    made = sample.run(config(tmp_path, **asked))
    first, second, third, fourth = map(Path, made.videos)
    kept = [path.stat().st_mtime_ns for path in (first, fourth)]
    second.unlink()  # stopped between its record and its pixels
    third.unlink()
    third.with_suffix(".json").unlink()
    with pytest.raises(ConfigError, match="--skip-existing"):
        sample.run(config(tmp_path, **asked))
    result = sample.run(config(tmp_path, **asked, skip_existing=True))
    assert (result.videos, result.kept) == (made.videos, 2)
    assert [path.stat().st_mtime_ns for path in (first, fourth)] == kept
    assert second.exists()
    assert third.exists()
    with pytest.raises(ConfigError, match=r"steps: found 3, wanted 4"):
        sample.run(config(tmp_path, **asked, skip_existing=True, steps=4))


def test_a_comparison_shows_base_and_adapter_from_the_same_noise(
    tmp_path, micro_folder, run_folder
):
    result = sample.run(config(tmp_path, adapter=(str(run_folder),), compare=True, format="frames"))
    (folder,) = map(Path, result.videos)
    frames = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
    assert frames.shape == (9, 32 + 16, 48 + 4 + 48, 3)  # a band of names, a gap
    assert np.array_equal(frames[:, 16:, :48], ours(micro_folder))
    assert np.array_equal(frames[:, 16:, 52:], ours(micro_folder, run_folder))
    assert frames[:, :16].max() > 200
    assert Image.open(folder / "0000.png").text["title"] == PROMPT


def test_prompts_come_from_a_file_or_from_the_activities_of_a_cache(tmp_path, held_out_cache):
    lines = tmp_path / "prompts.txt"
    lines.write_text("a dog\n\n  a cat  \n")
    made = plan(config(tmp_path, prompt=(), prompts=lines))
    assert [(video.prompt, video.seed) for video in made] == [("a dog", 0), ("a cat", 0)]
    objects = tmp_path / "prompts.jsonl"
    objects.write_text('{"prompt": "a dog", "seed": 9, "activity": "x"}\n{"prompt": "a cat"}\n')
    made = plan(config(tmp_path, prompt=(), prompts=objects, num_videos=2))
    assert [video.seed for video in made] == [9, 10, 0, 1]
    asked = {"cache": held_out_cache, "num_videos": 2}
    made = plan(config(tmp_path, **asked, prompt=("A person, {activity}",)))
    assert [(video.prompt, video.path.parent.name) for video in made][::2] == [
        ("A person, clap", "clap"), ("A person, sit", "sit"), ("A person, walk", "walk"),
    ]  # fmt: skip
    made = plan(config(tmp_path, **asked, prompt=()))
    assert [(video.prompt, video.seed) for video in made][:2] == [
        ("A person clapping their hands", 0), ("A person clapping their hands", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.txt", None, "cannot be read: No such file"),
        ("empty.txt", "\n \n", "holds no prompts"),
        ("bad.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2: expected an object"),
        ("seed.jsonl", '{"prompt": "a", "seed": "x"}\n', "line 1: expected an object"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused_with_its_line(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        plan(config(tmp_path, prompt=(), prompts=tmp_path / name))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt", "a {activity}"), "pass --cache"),
        (("--prompt", "a dog", "--cache", "c"), "needs {activity} in it"),
        (("--prompt", "a dog", "--compare"), "pass --adapter too"),
        (("--prompt", "a dog", "--overwrite", "--skip-existing"), "pass one"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(flags, message):
    assert message in cli.refuses("sample", *flags, exit_code=2)


def test_offloading_without_a_gpu_is_refused(tmp_path, micro_home):
    with pytest.raises(DeviceError, match="leave it out"):
        sample.run(config(tmp_path, offload="model", device="cpu"))


def test_shift_and_webm_are_taken(tmp_path, micro_home, caplog):
    plain = sample.run(config(tmp_path, output_dir=tmp_path / "a", format="frames"))
    shifted = sample.run(config(tmp_path, output_dir=tmp_path / "b", format="frames", shift=9.0))
    a, b = (
        np.asarray(Image.open(Path(result.videos[0]) / "0000.png")) for result in (plain, shifted)
    )
    assert not np.array_equal(a, b)
    tiled = sample.run(config(tmp_path, output_dir=tmp_path / "c", format="webm", vae_tiling=True))
    assert "vae_tiling" in caplog.text
    with av.open(tiled.videos[0]) as container:
        assert container.streams.video[0].codec_context.name == "vp9"
        assert sum(1 for _ in container.decode(video=0)) == 9
        assert container.metadata["title"] == PROMPT


def test_an_activity_without_held_out_clips_is_asked_for_with_its_other_captions(
    held_out_cache, caplog
):
    view = read_view(held_out_cache, "default")
    reader = StoreReader.of_view(held_out_cache, view)
    clips = [
        replace(clip, split="train") if clip.activity == "walk" else clip for clip in view.clips
    ]
    found = captions(reader, replace(view, clips=tuple(clips)), "val")
    assert sorted(found) == ["clap", "sit", "walk"]
    assert len(found["clap"]) == 1  # the held-out clip's alone
    assert "show walk" in caplog.text
    with pytest.raises(StoreError, match="split 'test'"):
        captions(reader, view, "test")
