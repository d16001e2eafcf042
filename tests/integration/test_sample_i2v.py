"""`wanlora sample` of an image-to-video model: against plain diffusers, and refusals."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from tests.support import cli
from tests.support.i2v import i2v_folder
from tests.support.models import random_tensors
from wanlora.adapters.file import LoraShape, save_adapter
from wanlora.adapters.lora import add_adapter
from wanlora.commands.sample.first_frames import ImageFile
from wanlora.commands.sample.pixels import _fitted
from wanlora.errors import ConfigError
from wanlora.store.reader import StoreReader
from wanlora.store.views import read_view
from wanlora.wan import pipeline as wan
from wanlora.wan.encoders import decode_latents, load_vae
from wanlora.wan.placement import part_bytes
from wanlora.wan.transformer import load_transformer
from wanlora.wan.variants import variant_of

CPU = torch.device("cpu")
PROMPT = "a red person waving on a white background"
NUM_STEPS = 3
FRAMES, HEIGHT, WIDTH = 5, 32, 32
SMALL = ("--num-frames", FRAMES, "--height", HEIGHT, "--width", WIDTH, "--steps", NUM_STEPS,
         "--guidance-scale", 3, "--negative-prompt", "blue", "--set", "format=frames")  # fmt: skip


def picture(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Smooth colours that differ everywhere, uint8 `[height, width, 3]`."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return i2v_folder(tmp_path_factory.mktemp("i2v") / "model", clip=False)


@pytest.fixture(scope="module")
def run_folder(model, tmp_path_factory):
    """An adapter of the model."""
    folder = tmp_path_factory.mktemp("run")
    shape = LoraShape(rank=4, alpha=8.0)
    parameters = add_adapter(
        load_transformer(model, dtype=torch.float32, device=CPU), shape, seed=0
    )
    provenance = {"model": str(model), "variant": "micro-i2v"}
    save_adapter(folder, random_tensors(parameters), shape, provenance=provenance)
    return folder


def plain(folder, image: np.ndarray, adapter=None, *, seed: int = 0, **more: float) -> np.ndarray:
    """Make a video as diffusers' documentation does."""
    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    if adapter:
        pipeline.load_lora_weights(str(adapter))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        Image.fromarray(image), PROMPT, negative_prompt="blue", num_frames=FRAMES, height=HEIGHT,
        width=WIDTH, num_inference_steps=NUM_STEPS, output_type="pil", guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(seed), **more,
    ).frames[0]  # fmt: skip
    return np.stack([np.asarray(frame) for frame in images])


def frames_of(video: str) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(Path(video).glob("*.png"))])


def record_of(video: str) -> dict:
    return json.loads(Path(video).with_suffix(".json").read_text())


def sample(*words: object) -> dict:
    done = cli.invoke("sample", "--prompt", PROMPT, *SMALL, "--json", *words)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def refused(*words: object) -> str:
    return cli.refuses("sample", *words, exit_code=2)


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "experts"])
def test_a_pipeline_gives_plain_diffusers_video(tmp_path, clip):
    folder = i2v_folder(tmp_path / "model", clip=clip, experts=not clip)
    low = None if clip else 2.0
    settings = wan.VideoSettings(
        num_frames=FRAMES, height=HEIGHT, width=WIDTH, steps=NUM_STEPS, guidance_scale=3.0,
        negative_prompt="blue", guidance_scale_low=low,
    )  # fmt: skip
    pipeline = wan.load_pipeline(folder, dtype=torch.float32, device=CPU)
    image = picture()
    ours = wan.generate(pipeline, PROMPT, settings, seed=4, image=image)
    guidance = {} if clip else {"guidance_scale_2": 2.0}
    assert np.array_equal(ours, plain(folder, image, seed=4, **guidance))
    other = wan.generate(pipeline, PROMPT, settings, seed=4, image=picture(seed=1))
    assert not np.array_equal(ours, other)
    parts = part_bytes(folder, variant_of(folder), device=CPU, dtype=torch.float32)
    assert ("image_encoder" in parts) == clip
    if clip:
        held = sum(parameter.nbytes for parameter in pipeline.image_encoder.parameters())
        assert parts["image_encoder"] == held


def test_base_and_adapter_start_from_the_upright_middle_of_the_image(
    model, run_folder, tmp_path, caplog
):
    caplog.set_level("INFO")
    upright = picture(48, WIDTH)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees
    file = save(tmp_path / "photo.png", np.rot90(upright), exif=exif)
    out = ("--output-dir", tmp_path / "out")
    result = sample("--adapter", run_folder, "--image", file, "--compare", *out)
    (video,) = result["videos"]
    middle = upright[8:40]
    both = frames_of(video)[:, 16:]
    assert np.abs(both[:, :, :WIDTH].astype(int) - plain(model, middle)).max() <= 1
    adapted = plain(model, middle, run_folder)
    assert np.abs(both[:, :, -WIDTH:].astype(int) - adapted).max() <= 1
    assert np.abs(adapted.astype(int) - plain(model, upright[:HEIGHT], run_folder)).max() > 5
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert record_of(video)["image"] == {"path": str(file), "sha256": sha256}
    assert result["images"] == {str(file): sha256}
    assert f"{file}: 32x48 px, cropped" in caplog.text

    again = ("--adapter", run_folder, "--compare", *out, "--skip-existing")
    assert sample("--image", file, *again)["kept"] == 1
    other = save(tmp_path / "other.png", picture(seed=1))
    message = refused("--prompt", PROMPT, *SMALL, *again, "--image", other)
    assert "image.sha256" in message


def test_a_picture_of_other_proportions_is_named_with_a_size_that_keeps_it(caplog):
    caplog.set_level("INFO")
    item = ImageFile(Path("wide.png"), "0", "--image")
    frame = _fitted(item, picture(180, 320), height=480, width=480)
    assert frame.shape == (480, 480, 3)
    for fact in ("320x180", "853x480", "480x480", "44 %"):
        assert fact in caplog.text
    assert "--height 352 --width 640" in caplog.text
    with pytest.raises(ConfigError, match=r"wide\.png.*10000x1 px"):
        _fitted(item, picture(1, 10_000), height=480, width=480)


def test_each_prompt_of_a_file_may_have_its_image(model, tmp_path):
    (tmp_path / "sub").mkdir()
    one, two = (save(tmp_path / "sub" / f"{n}.png", picture(seed=n)) for n in (1, 2))
    lines = [{"prompt": PROMPT, "image": "1.png"}, {"prompt": PROMPT}]
    prompts = tmp_path / "sub" / "prompts.jsonl"
    prompts.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    done = cli.invoke(
        "sample", "--model", model, "--prompts", prompts, "--image", two, *SMALL, "--json",
        "--output-dir", tmp_path / "out",
    )  # fmt: skip
    result = json.loads(done.stdout)
    paths = [record_of(video)["image"]["path"] for video in result["videos"]]
    assert paths == [str(one), str(two)]
    first, second = map(frames_of, result["videos"])
    assert np.array_equal(first, plain(model, picture(seed=1)))
    assert np.array_equal(second, plain(model, picture(seed=2)))
    prompts.write_text(json.dumps(lines[0] | {"image": 3}))
    again = ("--model", model, "--prompts", prompts, *SMALL)
    assert "line 1" in refused(*again)
    prompts.write_text(json.dumps(lines[0] | {"image": "3.png"}))
    assert str(tmp_path / "sub" / "3.png") in refused(*again)


def test_prompts_of_a_cache_start_from_the_first_frame_of_their_clips(
    model, held_out_cache, tmp_path
):
    out = ("--output-dir", tmp_path / "out")
    done = cli.invoke(
        "sample", "--model", model, "--cache", held_out_cache, *SMALL, "--json", *out
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    view = read_view(held_out_cache, "default")
    held_out = {clip.activity: clip for clip in view.clips if clip.split == "val"}
    assert result["images"] == {f"of val clip {c.clip_id}": c.key for c in held_out.values()}
    (video,) = (video for video in result["videos"] if "/sit/" in video)
    clip = held_out["sit"]
    assert record_of(video)["image"] == {
        "clip": clip.clip_id, "key": clip.key, "latents": view.fingerprint("latents"),
    }  # fmt: skip
    vae = load_vae(model, dtype=torch.float32, device=CPU, tf32=False)
    latents = StoreReader.of_view(held_out_cache, view).latents(clip.key)
    whole = decode_latents(vae, torch.from_numpy(latents)[None])[0]
    file = save(tmp_path / "first.png", whole[0].numpy())
    record = record_of(video)
    result = sample(
        "--model", model, "--image", file, "--seed", record["seed"], "--prompt", record["prompt"],
        "--output-dir", tmp_path / "again",
    )  # fmt: skip
    assert np.array_equal(frames_of(video), frames_of(result["videos"][-1]))


def test_an_image_is_needed_by_these_models_and_refused_by_others(model, held_out_cache, tmp_path):
    file = save(tmp_path / "a.png", picture())
    assert "--image" in refused("--prompt", PROMPT, "--model", model)
    message = refused("--prompt", PROMPT, "--model", "micro", "--image", file)
    assert f"--image {file}" in message
    assert "--image" in refused("--latents", tmp_path, "--image", file)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT, "image": "a.png"}))
    message = refused("--model", "micro", "--prompts", tmp_path / "prompts.jsonl")
    assert str(file) in message
    assert "prompts.jsonl" in message


def test_files_that_are_not_still_images_are_refused_by_name(model, tmp_path):
    def message(name: str) -> str:
        return refused("--prompt", PROMPT, *SMALL, "--model", model, "--image", tmp_path / name)

    assert str(tmp_path / "none.png") in message("none.png")
    (tmp_path / "clip.mp4").write_bytes(b"video")
    assert f"ffmpeg -i {tmp_path / 'clip.mp4'}" in message("clip.mp4")
    save(tmp_path / "cut.png", np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8))
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:300])
    assert "cut.png" in message("cut.png")
    moving = [Image.fromarray(picture(seed=n)) for n in (1, 2)]
    moving[0].save(tmp_path / "moving.webp", save_all=True, append_images=moving[1:])
    assert "2 frames" in message("moving.webp")
    assert str(tmp_path) in message("")
