"""From a folder of videos to an mp4, typed as a new user types it: real video, real processes."""

import json
import re
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
import safetensors.numpy

from tests.support import cli
from tests.support.caches import write_npz_clips
from tests.support.diffusers_video import plain_diffusers
from tests.support.server import script
from tests.support.videos import real_videos
from wanlora.media import mp4

STEPS = 20
PROMPT = "a man talks in a car"


@dataclass(frozen=True)
class Typed:
    """A working directory after all commands, and what each of them printed."""

    folder: Path
    printed: dict[str, str]

    def lines(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def typed(tmp_path_factory, micro_home) -> Typed:
    """Every stage once, with the defaults for all paths."""
    folder = tmp_path_factory.mktemp("home")
    videos = folder / "videos"
    videos.mkdir()
    for name, path in real_videos().items():
        shutil.copy(path, videos / f"{name.removesuffix('_pristine')}.mp4")
    (videos / "bikes.txt").write_text("people ride bikes in a street\n")
    (videos / "metadata.csv").write_text(
        "file_name,text,split\n"
        'bigbuckbunny.mp4,"a large rabbit, drawn",\n'
        f"carphone.mp4,{PROMPT},val\n"
    )  # fmt: skip
    commands = {
        "prepare": ("videos", "--num-frames", 17, "--height", 32, "--width", 48),
        "verify": (),
        "cache-latents": ("--model", "micro"),
        "inspect": ("--verify",),
        "train": ("--max-steps", STEPS, "--learning-rate", 1e-3),
        "sample": ("--adapter", "outputs/run", "--prompt", PROMPT, "--steps", 4),
    }
    printed = {
        name: cli.run(name, *arguments, cwd=folder).stdout for name, arguments in commands.items()
    }
    return Typed(folder, printed)


def test_each_command_says_what_to_type_next(typed):
    assert "next: wanlora verify data/processed" in typed.printed["prepare"]
    assert "next: wanlora cache-latents --manifest data/processed" in typed.printed["verify"]
    assert (
        "next: wanlora train --cache cache --output-dir outputs/run"
        in (typed.printed["cache-latents"])
    )
    assert "next: wanlora sample --adapter outputs/run --prompt" in typed.printed["train"]
    assert "outputs/samples/000-a-man-talks-in-a-car-seed0.mp4" in typed.printed["sample"]


def test_every_clip_of_the_videos_is_in_the_cache_with_its_caption(typed):
    clips = typed.lines("data/processed/train.jsonl") + typed.lines("data/processed/val.jsonl")
    assert len(clips) > 10
    assert {clip["source"].rpartition("/")[2]: clip["prompt"] for clip in clips} == {
        "bikes.mp4": "people ride bikes in a street",
        "bigbuckbunny.mp4": "a large rabbit, drawn",
        "carphone.mp4": PROMPT,
    }
    held_out = {clip["source"].rpartition("/")[2] for clip in clips if clip["split"] == "val"}
    assert held_out == {"carphone.mp4"}
    assert typed.lines("data/processed/errors.jsonl") == []
    whole = f"{len(clips)} of {len(clips)} clips can be loaded (17x32x48 {len(clips)})"
    assert whole in typed.printed["verify"]

    header, *view = typed.lines("cache/views/default.jsonl")
    assert header["model"] == "micro"
    assert {clip["clip_id"]: clip["split"] for clip in view} == {
        clip["clip_id"]: clip["split"] for clip in clips
    }
    found = json.loads(cli.invoke("inspect", typed.folder / "cache", "--json").stdout)
    assert (found["clips"], found["prompts"]) == (len(clips), 4)  # three captions and ""
    assert found["invalid"] == []
    assert found["buckets"][0]["latent_shape"] == [16, 5, 4, 6]
    assert f"{len(clips) + 4} rows read and checked" in typed.printed["inspect"]


def test_the_run_holds_its_figures_its_settings_and_one_adapter(typed):
    run = typed.folder / "outputs" / "run"
    metrics = typed.lines("outputs/run/metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(STEPS))
    assert {"loss", "lr", "grad_norm", "clips_per_s", "data_wait_s"} <= metrics[0].keys()
    assert all(np.isfinite(row["loss"]) for row in metrics)
    assert tomllib.loads((run / "config.toml").read_text())["max_steps"] == STEPS
    assert [path.name for path in run.glob("*.safetensors")] == ["pytorch_lora_weights.safetensors"]
    tensors = safetensors.numpy.load_file(run / "pytorch_lora_weights.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_the_video_is_what_plain_diffusers_makes_of_the_adapter(typed, micro_folder, tmp_path):
    """Both go through x264, which does not give the same bytes in every process (seen on equal
    frames); test_sample.py compares frames before it, bit for bit.
    """
    video = typed.folder / "outputs/samples/000-a-man-talks-in-a-car-seed0.mp4"
    record = json.loads(video.with_suffix(".json").read_text())
    settings = {
        "num_frames": 17, "height": 32, "width": 48, "num_inference_steps": 4,
        "guidance_scale": 3.0,
    }  # fmt: skip
    # The size of the clips that the adapter was trained on.
    assert record | {"num_frames": 17, "height": 32, "width": 48, "steps": 4} == record
    apart = {}
    for name, adapter in (("adapter", typed.folder / "outputs" / "run"), ("base", None)):
        frames = plain_diffusers(micro_folder, PROMPT, adapter, **settings)
        mp4.write(tmp_path / f"{name}.mp4", frames, fps=16.0, metadata={})
        decoded = _decode(tmp_path / f"{name}.mp4").astype(int)
        apart[name] = np.abs(_decode(video) - decoded).mean()
    assert apart["adapter"] < 4  # up to 2 were seen of equal frames
    assert apart["adapter"] < apart["base"]
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.height, stream.width) == (17, 32, 48)
        assert stream.average_rate == 16


def _decode(video: Path) -> np.ndarray:
    with av.open(str(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


DATALOADER = """
from wanlora import ClipDataset, collate_fn
from torch.utils.data import DataLoader

dataset = ClipDataset('data/processed/train.jsonl')
dataloader = DataLoader(dataset, batch_size=1, shuffle=True, collate_fn=collate_fn)
batch = next(iter(dataloader))
print(f'Loaded {len(dataset)} clips')
print(f"Frames shape: {batch['frames'].shape}")
print(f"Value range: [{batch['frames'].min():.2f}, {batch['frames'].max():.2f}]")
print(f"Prompt: {batch['prompts'][0]}")
"""


def test_the_smoke_test_of_npz_clips_runs_as_it_is_written(tmp_path, micro_home):
    """Check the loader, train 50 steps, make a video; underscores in options are accepted."""
    write_npz_clips(tmp_path / "data" / "processed", size=(5, 32, 32))
    done = cli.server().run(script(DATALOADER), cwd=tmp_path)
    loaded = done.stdout
    assert done.returncode == 0, done.stderr
    assert "Loaded 6 clips" in loaded
    assert "Frames shape: torch.Size([1, 5, 3, 32, 32])" in loaded
    assert re.search(r"Value range: \[-(0\.9\d|1\.00), (0\.9\d|1\.00)\]", loaded)

    cli.run("cache-latents", "--model", "micro", cwd=tmp_path)
    trained = cli.run(
        "train",
        "--manifest", "data/processed/train.jsonl",
        "--output_dir", "outputs/smoke_test",
        "--max_steps", 50,
        "--batch_size", 1,
        "--gradient_accumulation_steps", 4,
        cwd=tmp_path,
    )  # fmt: skip
    assert "a run of 50 optimizer steps" in trained.stderr
    assert len((tmp_path / "outputs/smoke_test/metrics.jsonl").read_text().splitlines()) == 50
    cli.run(
        "sample",
        "--lora_weights", "outputs/smoke_test",
        "--prompt", "A person clapping their hands",
        "--output", "test_generation.mp4",
        cwd=tmp_path,
    )  # fmt: skip
    assert _decode(tmp_path / "test_generation.mp4").shape == (5, 32, 32, 3)
