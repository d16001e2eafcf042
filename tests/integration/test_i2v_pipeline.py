"""From videos to an mp4 that starts from an image, typed as a user types it: real video.

A cache is made for text to video first, and gains what image to video needs.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.support import cli
from tests.support.i2v import i2v_folder
from tests.support.videos import real_videos
from wanlora.store.reader import StoreReader
from wanlora.store.views import read_view

CAPTIONS = {
    "bigbuckbunny": "a large rabbit, drawn",
    "bikes": "people ride bikes in a street",
    "carphone_pristine": "a man talks in a car",
}
SIZE = ("--num-frames", 17, "--height", 32, "--width", 48)
STEPS = 4


@dataclass(frozen=True)
class Typed:
    """A working directory after all commands, and what each printed."""

    folder: Path
    printed: dict[str, str]
    clips: int

    def json(self, name: str) -> dict:
        return json.loads(self.printed[name])


@pytest.fixture(scope="module")
def typed(tmp_path_factory, micro_home) -> Typed:
    folder = tmp_path_factory.mktemp("home")
    (folder / "videos").mkdir()
    for name, path in real_videos().items():
        shutil.copy(path, folder / "videos" / f"{name}.mp4")
        (folder / "videos" / f"{name}.txt").write_text(CAPTIONS[name])
    i2v_folder(folder / "image-model", clip=False)
    photo = np.zeros((90, 120, 3), np.uint8)
    photo[20:70, 40:80] = (200, 60, 40)
    Image.fromarray(photo).save(folder / "photo.png")
    image = ("--image", "photo.png", "--prompt", "a man talks in a car")
    commands = {
        "prepare": ("prepare", "videos", *SIZE, "--val-fraction", 0.4),
        "text": ("cache-latents", "--model", "micro", "--json"),
        "plan": ("cache-latents", "--model", "image-model", "--dry-run", "--json"),
        "image": ("cache-latents", "--model", "image-model", "--json"),
        "again": ("cache-latents", "--model", "image-model", "--json"),
        "verify": ("inspect", "cache", "--verify", "--json"),
        "train": ("train", "--max-steps", STEPS, "--rank", 4, "--lr", 1e-2, "--json"),
        "sample": ("sample", "--adapter", "outputs/run", *image, "--steps", 2, "--json"),
        "export": ("export", "--adapter", "outputs/run", "--format", "comfyui", "--output",
                   "person.safetensors"),
        "adapter": ("inspect", "person.safetensors", "--json"),
        "on text": ("train", "--model", "micro", "--output-dir", "outputs/text",
                    "--max-steps", 1, "--rank", 4, "--json"),
    }  # fmt: skip
    printed = {name: cli.run(*words, cwd=folder).stdout for name, words in commands.items()}
    with (folder / "cache" / "views" / "default.jsonl").open() as view:
        return Typed(folder, printed, sum(1 for _ in view) - 1)


def rows(result: dict) -> dict[str, tuple[int, int]]:
    """Rows by kind: encoded, and there before."""
    return {kind: (row["encoded"], row["cached"]) for kind, row in result["rows"].items()}


def test_a_cache_of_text_to_video_gains_only_the_conditions(typed):
    clips, captions = typed.clips, 4  # three and ""
    assert rows(typed.json("text")) == {"latents": (clips, 0), "text": (captions, 0)}
    added = {"latents": (0, clips), "text": (0, captions), "cond_latents": (clips, 0)}
    assert rows(typed.json("plan")) == rows(typed.json("image")) == added
    assert rows(typed.json("again")) == added | {"cond_latents": (0, clips)}
    verified = typed.json("verify")
    assert (verified["clips"], verified["invalid"]) == (clips, [])


def test_a_condition_begins_with_the_first_latent_frame_of_its_clip(typed):
    cache = typed.folder / "cache"
    view = read_view(cache, "default")
    reader = StoreReader.of_view(cache, view)
    for clip in view.clips:
        latents, condition = reader.latents(clip.key), reader.cond_latents(clip.key)
        assert latents.shape == condition.shape == (16, 5, 4, 6)
        assert np.array_equal(latents[:, 0], condition[:, 0])
        assert not np.array_equal(latents[:, 1], condition[:, 1])


def test_the_run_and_its_adapter_are_of_the_image_model(typed):
    lines = (typed.folder / "outputs/run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(STEPS))
    adapter = typed.json("adapter")
    assert (adapter["kind"], adapter["variant"], adapter["format"]) == (
        "I2V",
        "micro-i2v",
        "comfyui",
    )
    assert adapter["provenance"]["model"] == "image-model"  # not its path
    assert "image-to-video" in (typed.folder / "outputs/run/README.md").read_text()


def test_the_video_is_made_from_the_image(typed):
    """test_sample_i2v.py compares the frames with those of plain diffusers."""
    (video,) = (typed.folder / "outputs" / "samples").glob("*.mp4")
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.height, stream.width) == (17, 32, 48)
    record = json.loads(video.with_suffix(".json").read_text())
    photo = (typed.folder / "photo.png").read_bytes()
    assert hashlib.sha256(photo).hexdigest() in json.dumps(record)


def test_text_to_video_trains_on_the_same_cache_and_adapters_do_not_mix(typed, monkeypatch):
    monkeypatch.chdir(typed.folder)
    image = ("--image", "photo.png", "--prompt", "x", "--output-dir", "outputs/mixed")
    for words in (
        ("sample", "--adapter", "outputs/text", "--model", "image-model", *image),
        ("evaluate", "--adapter", "outputs/text", "--model", "image-model", "--cache", "cache",
         "--output-dir", "outputs/mixed"),
        ("train", "--init-adapter", "outputs/text", "--model", "image-model", "--output-dir",
         "outputs/mixed"),
        ("export", "--adapter", "outputs/text", "--model", "image-model", "--format", "merged",
         "--output", "outputs/mixed"),
        ("sample", "--adapter", "outputs/run", "--model", "micro", "--prompt", "x",
         "--output-dir", "outputs/mixed"),
        ("train", "--init-adapter", "outputs/run", "--model", "micro", "--output-dir",
         "outputs/mixed"),
    ):  # fmt: skip
        message = cli.refuses(*words)
        assert all(name in message for name in ("micro (micro)", "micro-i2v")), message
    assert not Path("outputs/mixed").exists()
