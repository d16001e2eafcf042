"""`wanlora evaluate`: what it finds, how it goes on after a kill, and what it never loads."""

import json
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import cli
from tests.support.browser import CHROMIUM, title_in_a_browser
from tests.support.diffusers_video import plain_diffusers
from tests.support.models import random_tensors
from wanlora.adapters.attach import attach
from wanlora.adapters.file import LoraShape, save_adapter
from wanlora.adapters.lora import add_adapter
from wanlora.commands.evaluate import preflight, videos
from wanlora.commands.evaluate import run as evaluate
from wanlora.commands.evaluate.setup import open_setup
from wanlora.commands.evaluate.subjects import subjects
from wanlora.commands.evaluate.video_plan import plan
from wanlora.config import EvaluateConfig
from wanlora.wan.encoders import load_vae
from wanlora.wan.transformer import load_transformer

CPU = torch.device("cpu")
QUICK = {"num_sigmas": 4, "steps": 2, "videos_per_activity": 1}


@pytest.fixture(scope="module")
def trained(held_out_cache, tmp_path_factory) -> Path:
    """A run with two checkpoints that has learned something, on six clips."""
    run = tmp_path_factory.mktemp("trained") / "run"
    done = cli.invoke(
        "train", "--cache", held_out_cache, "--output-dir", run, "--max-steps", 24,
        "--gradient-accumulation-steps", 2, "--learning-rate", "5e-3", "--save-steps", 12,
        "--set", "optimizer.warmup_steps=0", "--set", "lora.rank=4",
        "--set", "validation.num_sigmas=4", "--set", "validation.train_clips=false",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return run


@pytest.fixture(scope="module")
def evaluated(trained, held_out_cache, tmp_path_factory) -> Path:
    """The folder of an evaluation of that run."""
    folder = tmp_path_factory.mktemp("evaluated") / "evaluation"
    evaluate(config(held_out_cache, folder, trained))
    return folder


def config(cache, folder, *adapters, **values) -> EvaluateConfig:
    settings = {"cache": cache, "output_dir": folder, "adapter": tuple(map(str, adapters))}
    return EvaluateConfig(**(settings | QUICK | values))


def read(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def made(folder: Path) -> dict[str, int]:
    """Every video under a folder, with when it was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}


def write_adapter(micro_folder, folder: Path, *, scale: float) -> Path:
    transformer = load_transformer(micro_folder, dtype=torch.float32, device=CPU)
    shape = LoraShape(rank=2, alpha=2.0)
    tensors = random_tensors(add_adapter(transformer, shape, seed=0))
    for name in tensors:
        if name.endswith("lora_B.weight"):
            tensors[name] = scale * tensors[name]
    return save_adapter(folder, tensors, shape, provenance={})


def test_an_adapter_that_learned_has_an_interval_off_zero(evaluated):
    found = read(evaluated)["validation"]
    assert found["adapter"] < found["base"]
    assert found["ci95"][0] < found["paired_difference"] < found["ci95"][1] < 0
    assert found["paired_difference"] == pytest.approx(found["adapter"] - found["base"])
    assert sorted(found["per_activity"]) == ["clap", "sit", "walk"]
    mean = np.mean([part["paired_difference"] for part in found["per_activity"].values()])
    assert mean == pytest.approx(found["paired_difference"])
    mean = np.mean([row["paired_difference"] for row in found["per_sigma"]])
    assert mean == pytest.approx(found["paired_difference"])


def test_the_loss_is_the_one_that_training_reported(evaluated, trained):
    lines = (trained / "validation.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    found = read(evaluated)["validation"]
    assert (last["split"], last["step"]) == ("val", 24)
    assert (found["adapter"], found["base"]) == (last["mean"], last["base_mean"])
    assert found["ci95"] == last["ci95"]
    assert (found["clips"], found["source_groups"]) == (last["num_clips"], last["num_groups"])
    assert [[row["sigma"], row["adapter"], row["base"]] for row in found["per_sigma"]] == last[
        "per_sigma"
    ]


def test_nothing_learned_is_no_difference(held_out_cache, micro_folder, tmp_path):
    """B = 0, and a scale of 0, are the base bit for bit; an adapter is equal to itself."""
    nothing = write_adapter(micro_folder, tmp_path / "nothing", scale=0.0)
    something = write_adapter(micro_folder, tmp_path / "base", scale=1.0)  # a name that is taken
    folder = tmp_path / "evaluation"
    evaluate(
        config(held_out_cache, folder, nothing, f"{something}=0", something, something,
               videos_per_activity=0)
    )  # fmt: skip
    found = {item["name"]: item for item in read(folder)["adapters"]}
    assert list(found) == ["nothing", "base at 0", "base (2)", "base (3)"]
    for name in ("nothing", "base at 0"):
        validation = found[name]["validation"]
        assert (validation["paired_difference"], validation["ci95"]) == (0.0, [0.0, 0.0])
    first, second = found["base (2)"], found["base (3)"]
    assert first["validation"] == second["validation"]
    assert first["validation"]["paired_difference"] != 0.0
    assert first["against_best"] == second["against_best"]
    assert not list(folder.rglob("*.mp4"))


def test_its_videos_are_those_of_plain_diffusers(held_out_cache, micro_folder, tmp_path):
    adapter = write_adapter(micro_folder, tmp_path / "adapter", scale=1.0)
    settings = config(held_out_cache, tmp_path / "out", adapter, seed=3)
    setup, experts = open_setup(settings, preflight.check(settings))
    compared = subjects(settings.adapter, experts, checkpoints=False)
    models = plan(setup, compared, base_dir=tmp_path, output_dir=tmp_path)
    transformer = load_transformer(micro_folder, dtype=torch.float32, device=CPU)
    vae = load_vae(micro_folder, dtype=torch.float32, device=CPU, tf32=False)
    for model, file in zip(models, (None, adapter.parent), strict=True):
        if model.subjects:
            attach(transformer, [item.scaled for item in model.subjects])
        video = model.videos[0]
        frames = videos.generate(setup, {None: transformer}, vae, video)
        theirs = plain_diffusers(
            micro_folder, video.prompt, file, seed=3, num_frames=5, height=32, width=32,
            num_inference_steps=2, guidance_scale=3.0,
        )  # fmt: skip
        assert np.array_equal(frames, theirs)


def test_what_is_there_is_not_made_again(evaluated, trained, held_out_cache, tmp_path, caplog):
    before = made(evaluated.parent)
    assert len(before) == 9  # of three activities each: the real clip, the base's, the adapter's
    lost = next(path for path in before if "/videos/run/" in path)
    Path(lost).unlink()
    evaluate(config(held_out_cache, evaluated, trained))
    assert "1 to make" in caplog.text
    after = made(evaluated.parent)
    assert {path for path in after if after[path] != before[path]} == {lost}
    # Another adapter, in another folder: the base's videos are those beside it.
    caplog.clear()
    other = evaluated.parent / "other"
    evaluate(config(held_out_cache, other, f"{trained}=0.5"))
    assert re.search(r"\b3 .*; 3 to make", caplog.text)
    assert len(made(other)) == 6


def test_killed_in_the_middle_of_its_videos_it_makes_the_others_without_a_text_encoder(
    trained, held_out_cache, tmp_path
):
    folder = tmp_path / "evaluation"
    arguments = (
        "evaluate", "--adapter", trained, "--cache", held_out_cache, "--output-dir", folder,
        "--set", "num_sigmas=2", "--steps", 2, "--videos-per-activity", 2,
    )  # fmt: skip
    process = cli.start(*arguments)
    deadline = time.monotonic() + 300
    while len(made(tmp_path)) < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = made(tmp_path)
    assert 5 <= len(before) < 15
    modules = cli.modules_after(*arguments)
    after = made(tmp_path)
    assert len(after) == 15
    assert before.items() <= after.items()
    listed = read(folder)["videos"]["list"]
    assert {path for row in listed for path in row["files"].values()} == set(after)
    # Cached prompts are all it needs.
    assert "diffusers.models.autoencoders.autoencoder_kl_wan" in modules
    assert not modules & {
        "transformers.models.umt5.modeling_umt5", "diffusers.pipelines", "wanlora.wan.pipeline",
    }  # fmt: skip


def test_the_checkpoints_of_a_run_are_compared_each_once(trained, held_out_cache, tmp_path):
    folder = tmp_path / "evaluation"
    evaluate(config(held_out_cache, folder, trained, checkpoints=True, videos_per_activity=0))
    found = read(folder)
    # The root is the newest checkpoint, and so is the best: equal files count once.
    assert [(item["name"], item["step"]) for item in found["adapters"]] == [
        ("run step-000012", 12), ("run step-000024", 24),
    ]  # fmt: skip
    best = min(found["adapters"], key=lambda item: item["validation"]["adapter"])
    assert found["best"] == best["name"]
    assert "Change in %" in (folder / "report.html").read_text()


def test_measures_are_said_of_each_model_and_activity(evaluated):
    measures = read(evaluated)["videos"]["measures"]
    assert set(measures["per_activity"]) == {"real clip", "base", "run"}
    for by_activity in measures["per_activity"].values():
        for values in by_activity.values():
            assert 0 < values["motion"] < 1
            assert -1 <= values["consistency"] <= 1
            assert values["diversity"] is None  # one video of each activity
    assert set(measures["against_base"]["run"]) == {"motion", "consistency", "sharpness"}


def test_what_cannot_be_evaluated_is_refused_with_the_way_out(trained, held_out_cache, tmp_path):
    flags = ("evaluate", "--output-dir", tmp_path / "out", "--adapter")
    assert "--adapter is required" in cli.refuses("evaluate", exit_code=2)
    assert "nowhere" in cli.refuses(*flags, "nowhere", "--cache", held_out_cache)
    flags = (*flags, trained, "--cache", held_out_cache)
    message = cli.refuses(*flags, "--set", "split=test")
    assert re.search(r"'test'; .*\b9 .*: train, val", message)
    assert "--val-fraction" in message
    message = cli.refuses(*flags, "--width", 33, exit_code=2)
    assert "use 32 or 48" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_plays_base_and_adapter_as_one(evaluated, tmp_path):
    text = (evaluated / "report.html").read_text()
    assert "http://" not in text
    assert "https://" not in text
    probe = tmp_path / "probe.html"
    script = """<script>addEventListener("load", async () => {
      const wait = ms => new Promise(done => setTimeout(done, ms));
      const players = [...document.querySelectorAll(".player")];
      const videos = players.map(player => [...player.querySelectorAll("video")]);
      await Promise.all(videos.flat().map(v => v.readyState >= 2 || new Promise(done => {
        v.onloadeddata = done; v.onerror = done; })));
      const slider = players[0].querySelector("input");
      slider.value = 0.5; slider.dispatchEvent(new Event("input")); await wait(300);
      document.title = JSON.stringify({
        players: videos.map(row => row.length), sizes: videos.flat().map(v => v.videoWidth),
        errors: videos.flat().filter(v => v.error).length,
        times: videos[0].map(v => v.currentTime.toFixed(3)),
        charts: document.querySelectorAll(".chart svg").length,
        clipped: [...document.querySelectorAll(".chart svg text")].filter(t => { const b = t.getBoundingClientRect(),
          s = t.closest("svg").getBoundingClientRect(); return b.left < s.left - 1 || b.right > s.right + 1; }).length,
        activities: [...document.querySelectorAll("h3")].map(h => h.textContent) }); });</script>"""  # noqa: E501
    probe.write_text(text.replace("</body>", f"{script}</body>"))
    found = title_in_a_browser(probe, tmp_path)
    assert found["players"] == [3, 3, 3]
    assert found["sizes"] == [32] * 9
    assert (found["errors"], found["clipped"], found["charts"]) == (0, 0, 3)
    assert len(set(found["times"])) == 1
    assert float(found["times"][0]) > 0
    assert found["activities"][:3] == ["clap", "sit", "walk"]


def test_a_real_clip_is_the_one_whose_caption_is_asked_for(evaluated, held_out_cache):
    from wanlora.media.decode import decode
    from wanlora.media.quality import psnr
    from wanlora.store.reader import StoreReader
    from wanlora.store.views import read_view
    from wanlora.wan.encoders import decode_latents
    from wanlora.wan.model_folder import resolve

    view = read_view(held_out_cache, "default")
    reader = StoreReader.of_view(held_out_cache, view)
    vae = load_vae(resolve("micro", ["vae"]), dtype=torch.float32, device=CPU, tf32=False)
    clips = [clip for clip in view.clips if clip.split == "val"]
    decoded = [
        decode_latents(vae, torch.from_numpy(reader.latents(clip.key))[None])[0].numpy()
        for clip in clips
    ]
    for row in read(evaluated)["videos"]["list"]:
        shown = decode(Path(row["files"]["real clip"]), start_s=0, fps=16, num_frames=5)
        closest = clips[int(np.argmax([psnr(shown, frames) for frames in decoded]))]
        assert closest.activity == row["activity"]
        assert list(reader.prompts(closest.prompts[:1]).values()) == [row["prompt"]]


def test_damaged_files_are_named_with_the_way_out(evaluated, trained, held_out_cache):
    flags = (
        "evaluate", "--adapter", trained, "--cache", held_out_cache, "--output-dir", evaluated,
        "--set", "num_sigmas=4", "--steps", 2, "--videos-per-activity", 1,
    )  # fmt: skip
    video = next(path for path in made(evaluated) if "/videos/run/" in path)
    whole = Path(video).read_bytes()
    Path(video).write_bytes(whole[:100])
    message = cli.refuses(*flags)
    assert video in message
    Path(video).write_bytes(whole)
    tables = evaluated / "losses.json"
    whole = tables.read_bytes()
    tables.write_bytes(whole[:100])
    assert f"{tables} is damaged" in cli.refuses(*flags)
    tables.write_bytes(whole)


def test_weights_that_are_not_finite_are_named_not_averaged(held_out_cache, micro_folder, tmp_path):
    """A finite file can still overflow: here the update is 1e38 times too large."""
    adapter = write_adapter(micro_folder, tmp_path / "huge", scale=1e38)
    message = cli.refuses(
        "evaluate", "--adapter", adapter, "--cache", held_out_cache, "--output-dir",
        tmp_path / "out", "--videos-per-activity", 0, "--set", "num_sigmas=1",
    )  # fmt: skip
    assert f"the loss of {adapter} on val clip clip-006" in message
    assert any(f"is {value}" in message for value in ("inf", "nan"))
