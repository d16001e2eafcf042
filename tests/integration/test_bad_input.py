"""Everything a person can get wrong, through the real command line.

Each is refused with the right exit code, a message that says what, which and how to mend it, no
traceback, and nothing left behind.
"""

import json
import logging
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from tests.support import cli
from tests.support.videos import real_videos, write_npz, write_text, write_truncated, write_video
from wanlora.wan.variants import VARIANTS

SMALL = ("--num-frames", 17, "--height", 32, "--width", 48)
TINY_VIDEO = ("--num-frames", 5, "--height", 32, "--width", 32, "--steps", 1)
HUB_MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty working directory, so that relative defaults lead nowhere."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# --- prepare -------------------------------------------------------------------------------------


def test_a_missing_folder(home):
    message = cli.refuses("prepare", home / "nowhere")
    assert str(home / "nowhere") in message
    assert files_in(home) == set()


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.CSV"])
def test_a_captions_file_in_place_of_a_video(home, name):
    (home / name).write_text("{}")
    assert f"--captions {home / name}" in cli.refuses("prepare", name)
    assert files_in(home) == {name}


def test_a_page_that_cannot_be_written_is_refused_before_the_work(home, cache_fp16):
    (home / "file").touch()
    for command in (("prepare", "nowhere"), ("verify", "nowhere"), ("inspect", cache_fp16)):
        message = cli.refuses(*command, "--html", "file/page.html")
        assert re.search(r"\bfile .*--html\b", message)
        assert "for --html" in cli.refuses(*command, "--html", ".")
    assert files_in(home) == {"file"}


def test_a_folder_without_videos(home):
    (home / "empty").mkdir()
    message = cli.refuses("prepare", "empty")
    assert "holds no video" in message
    assert ".mp4" in message
    assert files_in(home) == {"empty"}


def test_no_captions(home):
    write_video(home / "videos" / "walk.mp4", num_frames=20)
    message = cli.refuses("prepare", "videos", *SMALL)
    assert re.search(r"\b1 source .*caption", message)
    assert ".txt" in message
    assert "--captions" in message
    assert files_in(home) == {"videos", "videos/walk.mp4"}


@pytest.mark.parametrize("content", [b" \n", b"\xff\xfe\x00b\x00a", None])
def test_a_caption_that_is_empty_or_no_text_or_a_folder(home, content):
    video = write_video(home / "videos" / "walk.mp4", num_frames=20)
    sidecar = video.with_suffix(".txt")
    sidecar.mkdir() if content is None else sidecar.write_bytes(content)
    message = cli.refuses("prepare", "videos", *SMALL)
    assert re.search(r"\b1 source .*caption", message)
    if content and content.strip():
        assert "walk.txt cannot be read" in message
        assert "as UTF-8" in message


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (write_text, "unreadable"),
        (write_truncated, "truncated"),
        (lambda path: path.write_bytes(real_videos()["bikes"].read_bytes()[:300_000]), "unread"),
        (lambda path: path.write_bytes(b""), "unreadable"),
    ],
    ids=["text", "truncated", "without-index", "empty"],
)
def test_a_file_that_is_no_whole_video(home, write, reason):
    (home / "videos").mkdir()
    write(home / "videos" / "walk.mp4")
    (home / "videos" / "walk.txt").write_text("a person walks")
    message = cli.refuses("prepare", "videos", "--output", "data", *SMALL)
    assert "1 source:" in message
    assert f"[{reason}" in message
    assert str(home / "videos" / "walk.mp4") in message
    assert "errors.jsonl" in message
    assert not files_in(home / "data") & {"train.jsonl", "val.jsonl"}


@pytest.mark.parametrize("command", ["prepare", "sample"])
def test_eighty_frames(home, command):
    arguments = ("videos",) if command == "prepare" else ("--prompt", "x", "--model", "micro")
    message = cli.refuses(command, *arguments, "--num-frames", 80, exit_code=2)
    assert "80 frames; expected 4k+1" in message
    assert "use 77 or 81" in message
    assert files_in(home) == set()


@pytest.mark.parametrize("command", ["prepare", "sample"])
def test_a_size_that_is_no_multiple_of_16(home, command):
    arguments = ("videos",) if command == "prepare" else ("--prompt", "x", "--model", "micro")
    message = cli.refuses(command, *arguments, "--height", 100, exit_code=2)
    assert "height 100 px" in message
    assert "96 or 112" in message
    assert files_in(home) == set()


def test_a_captions_file_that_is_missing_or_a_folder(home):
    write_video(home / "walk.mp4", num_frames=20)
    assert "nowhere.csv" in cli.refuses("prepare", "walk.mp4", "--captions", "nowhere.csv")
    (home / "folder.csv").mkdir()
    message = cli.refuses("prepare", "walk.mp4", "--captions", "folder.csv")
    assert "folder.csv" in message


def test_names_with_spaces_and_captions_of_any_script_go_through(home):
    video = write_video(home / "my vidéos" / "ein Clip 走.mp4", num_frames=40)
    caption = "走路 🚶\nand a “second” line, <b>&amp;</b>"
    video.with_suffix(".txt").write_text(caption, encoding="utf-8")
    result = cli.invoke("prepare", "my vidéos", "--output", "my data", *SMALL)
    assert result.exit_code == 0, result.output
    assert "wanlora verify 'my data'" in result.output
    (line,) = (home / "my data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["prompt"] == caption
    result = cli.invoke("verify", "my data")
    assert result.exit_code == 0, result.output
    assert "wanlora cache-latents --manifest 'my data'" in result.output


def test_any_text_is_printed_on_a_terminal_that_cannot_show_it(home, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii:strict")
    write_npz(home / "größer" / "clip.npz")
    (home / "größer" / "clip.txt").write_text("走路 🚶", encoding="utf-8")
    done = cli.run("prepare", "größer", "--dry-run", "--set", "workers=1", cwd=home)
    assert r"gr\xf6\xdfer" in done.stdout


# --- manifests and .npz clips --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": None}, "expected an array named frames, or a single array; found a, b"),
        ({"dtype": np.float32}, "expected uint8, found float32"),
        ({"shape": (5, 3, 32, 48)}, "expected shape (frames, height, width, 3), found (5, 3, 32,"),
        ({"num_frames": 16}, "16 frames; expected 4k+1"),
        ({"height": 40}, "height 40 px; expected a multiple of 16: use 32 or 48"),
    ],
    ids=["key", "dtype", "shape", "frames", "size"],
)
def test_an_npz_clip_that_does_not_fit(home, micro_home, change, message):
    if "shape" in change:
        np.savez(home / "clip.npz", frames=np.zeros(change["shape"], np.uint8))
    elif "key" in change:
        np.savez(home / "clip.npz", a=np.zeros(3), b=np.zeros(3))
    else:
        write_npz(home / "clip.npz", **({"num_frames": 5} | change))
    (home / "train.jsonl").write_text('{"npz": "clip.npz", "prompt": "a person walks"}\n')
    found = cli.refuses("cache-latents", "--manifest", "train.jsonl", "--model", "micro")
    assert str(home / "clip.npz") in found
    assert message in found
    assert "wanlora verify train.jsonl" in found
    assert files_in(home) == {"clip.npz", "train.jsonl"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "train.jsonl holds no clip; make one with: wanlora prepare"),
        ("\n \n", "train.jsonl holds no clip"),
        ("path,caption\na.npz,walk\n", "train.jsonl:1: not JSON"),
        ('{"npz": "a.npz", "prompt": "x"', "train.jsonl:1: not JSON"),
        ("[1, 2]\n", "train.jsonl:1: expected an object"),
        ('{"npz": "a.npz"}\n', "train.jsonl:1: no caption; expected text under one of prompt"),
        ('{"npz": "a.npz", "prompt": " "}\n', "train.jsonl:1: no caption"),
        ('{"npz": "a.npz", "prompt": 7}\n', "train.jsonl:1: the caption is 7; expected text"),
        ('{"prompt": "x"}\n', "train.jsonl:1: no path; expected one of"),
        ('{"npz": "a.mp4", "prompt": "x"}\n', "wanlora prepare VIDEOS --captions"),
        ('{"npz": "a.npz", "prompt": "x", "caption": "y"}\n', "prompt and caption mean the same"),
    ],
)
def test_a_manifest_that_is_empty_or_says_nothing(home, content, message):
    (home / "train.jsonl").write_text(content)
    for command in (
        ("cache-latents", "--manifest", "train.jsonl", "--model", "micro"),
        ("verify", "train.jsonl"),
    ):
        assert message in cli.refuses(*command)
    assert files_in(home) == {"train.jsonl"}


def test_a_manifest_that_is_missing_or_no_text(home, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", _tripwire)
    message = cli.refuses("cache-latents", "--device", "cpu")  # before a model is asked for
    assert "no manifest at data/processed" in message
    assert "wanlora prepare VIDEOS" in message
    shutil.copy(real_videos()["bikes"], home / "train.jsonl")
    message = cli.refuses("cache-latents", "--manifest", "train.jsonl", "--device", "cpu")
    assert "train.jsonl" in message
    assert "not UTF-8 text" in message


# --- caches --------------------------------------------------------------------------------------


def test_a_cache_or_view_that_does_not_exist(home, cache_fp16):
    message = cli.refuses("train", "--cache", "nowhere")
    assert "wanlora cache-latents --cache nowhere" in message
    message = cli.refuses("train", "--cache", cache_fp16, "--view", "small")
    assert "view 'small'" in message
    assert "default)" in message
    assert f"wanlora cache-latents --cache {cache_fp16} --view small" in message
    assert "nowhere" in cli.refuses("inspect", "nowhere")
    (home / "merged").mkdir()
    (home / "merged/model_index.json").write_text("{}")
    assert "--model merged" in cli.refuses("inspect", "merged")
    shutil.rmtree(home / "merged")
    assert files_in(home) == set()


def test_a_cache_made_with_another_model_is_shown_field_by_field(home, cache_fp16):
    """The cache is the micro model's; the transformer is the configuration of the real one."""
    row = VARIANTS["t2v-1.3b"]
    config = {
        "num_layers": row.shape.num_layers, "num_attention_heads": row.shape.num_attention_heads,
        "attention_head_dim": row.shape.attention_head_dim, "ffn_dim": row.shape.ffn_dim,
        "text_dim": row.shape.text_dim, "in_channels": row.vae.z_dim, "out_channels": row.vae.z_dim,
    }  # fmt: skip
    (home / "model" / "transformer").mkdir(parents=True)
    (home / "model" / "transformer" / "config.json").write_text(json.dumps(config))
    weights = home / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    safetensors.numpy.save_file({"x": np.zeros(1)}, weights)
    before = files_in(home)
    message = cli.refuses("train", "--cache", cache_fp16, "--model", "model", "--device", "cpu")
    assert re.search(r"\bmicro\b.* t2v-1\.3b", message)
    assert "text.text_dim: found 64, wanted 4096" in message
    assert "latents.latents_mean" in message
    assert f"wanlora cache-latents --cache {cache_fp16} --model" in message
    assert files_in(home) == before


def test_a_manifest_whose_clips_are_not_in_the_view(home, cache_fp16):
    write_npz(home / "new.npz", num_frames=9)
    (home / "train.jsonl").write_text('{"npz": "new.npz", "prompt": "x"}\n')
    message = cli.refuses("train", "--cache", cache_fp16, "--manifest", "train.jsonl")
    assert re.search(r"\b1 clips .*view 'default'", message)
    assert f"--cache {cache_fp16} --model micro --manifest train.jsonl" in message
    message = cli.refuses("train", "--cache", cache_fp16, "--set", "split=test")
    assert re.search(r"'test' .*\b6 clips, .*: train", message)
    assert files_in(home) == {"new.npz", "train.jsonl"}


@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_where_the_cache_should_be(home, micro_home, below):
    (home / "file").write_text("mine")
    write_npz(home / "clip.npz", num_frames=5)
    (home / "train.jsonl").write_text('{"npz": "clip.npz", "prompt": "x"}\n')
    before = files_in(home)
    message = cli.refuses(
        "cache-latents", "--manifest", "train.jsonl", "--model", "micro",
        "--cache", Path("file", below),
    )  # fmt: skip
    assert f"{home / 'file'} is a file" in message
    assert "--cache" in message
    assert "no latent cache" in cli.refuses("train", "--cache", Path("file", below))
    assert "no latent cache" in cli.refuses("inspect", Path("file", below))
    assert files_in(home) == before
    assert (home / "file").read_text() == "mine"


# --- where results go ----------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "below/deep"])
def test_a_file_where_the_output_should_be(home, cache_fp16, micro_home, below):
    """Refused before anything is computed: the sampler is never loaded."""
    (home / "file").write_text("mine")
    video = write_video(home / "videos" / "walk.mp4", num_frames=20)
    video.with_suffix(".txt").write_text("a person walks")
    before = files_in(home)
    place = Path("file", below)
    for command, flag in (
        (("prepare", "videos", *SMALL, "--output", place), "--output"),
        (("train", "--cache", cache_fp16, "--output-dir", place), "--output-dir"),
        (("sample", "--model", "micro", "--prompt", "x", "--output-dir", place), "--output-dir"),
        (("sample", "--model", "micro", "--prompt", "x", "--output", place / "x.mp4"), "--output"),
        (("demo", "--output-dir", place), "--output-dir"),
    ):
        message = cli.refuses(*command)
        assert f"{home / 'file'} is a file" in message
        assert f"with {flag}" in message
    assert files_in(home) == before
    assert (home / "file").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_a_folder_that_may_not_be_written(home, cache_fp16, monkeypatch):
    (home / "locked").mkdir(mode=0o555)
    # The superuser may write anywhere; a read-only disk answers os.access in the same way.
    monkeypatch.setattr("os.access", lambda path, mode: "locked" not in str(path))
    message = cli.refuses("train", "--cache", cache_fp16, "--output-dir", "locked/run")
    assert re.search(r"\blocked .*read-only", message)
    assert "--output-dir" in message


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--max-steps", 0), "max_steps: Input should be greater than or equal to 1"),
        (("train", "--max-steps", "many"), "max_steps: Input should be a valid integer"),
        (("train", "--learning-rate", "nan"), "learning_rate: Input should be a finite number"),
        (("train", "--set", "lora.rnak=3"), "unknown setting lora.rnak (did you mean lora.rank?)"),
        (("train", "--set", "rank=3"), "unknown setting rank (did you mean lora.rank?)"),
        (("train", "--set", "preview.every=3"), "preview (did you mean previews?)"),
        (("train", "--set", "lora=3"), "lora is a group of settings, not a value (found 3)"),
        (("train", "--set", "lora"), "expected NAME=VALUE, for example --set lora.rank=16"),
        (("train", "--device", "gpu"), "device: found 'gpu'"),
        (("train", "--view", "../x"), "view: found '../x'"),
        (("train", "--config", "no.toml"), "no configuration file at no.toml"),
        (("train", "--config", "."), "configuration file . cannot be read: Is a directory"),
        (("cache-latents", "--set", "validation_prompts=a dog"), "expected a list, as in --set"),
        (("sample",), "nothing to sample: pass --prompt"),
        (("sample", "--prompt", "x", "--output", "x.gif"), "expected a name ending in .mp4"),
        (("prepare",), "SOURCES is required"),
        (("train", "--steps", 3), "--max-steps"),
        (("trian",), "Did you mean 'train'?"),
    ],
)
def test_a_setting_that_is_unknown_or_out_of_range(home, arguments, message):
    assert message in cli.refuses(*arguments, exit_code=2)
    assert files_in(home) == set()


def test_an_unknown_key_in_a_file(home):
    (home / "run.toml").write_text("[lora]\nrnak = 3\n")
    message = cli.refuses("train", "--config", "run.toml", exit_code=2)
    assert re.search(r"lora\.rnak .*lora\.rank", message)
    assert "wanlora config train" in message


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("proj_in", "targets 'proj_in' matches no linear module of the transformer"),
        ('["to_q","proj_in","nothing"]', "target 'proj_in', 'nothing' matches no linear module"),
        ("[]", "an empty list of targets matches no linear module"),
        ("blocks.(", "targets 'blocks.(' is not a regex"),
    ],
)
def test_a_target_module_that_matches_nothing(home, cache_fp16, targets, message):
    found = cli.refuses("train", "--cache", cache_fp16, "--set", f"lora.targets={targets}")
    assert message in found
    if "regex" not in message:
        assert "blocks.N.attn1.to_q" in found
        assert "Presets: attention, attention+ffn, all-linear" in found
    assert files_in(home) == set()


# --- training ------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(home, cache_fp16):
    message = cli.refuses(
        "train", "--cache", cache_fp16, "--output-dir", "run", "--learning-rate", 1e30,
        "--max-steps", 6, "--save-steps", 1, "--set", "optimizer.warmup_steps=0",
        "--set", "lora.rank=2",
    )  # fmt: skip
    assert re.search(r"step 1: .*not finite", message)
    assert "Clips: clip-00" in message
    assert "lower --learning-rate" in message
    assert f"wanlora inspect {cache_fp16} --verify" in message
    run = home / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000001"]
    saved = (run / "checkpoints" / "step-000001" / "pytorch_lora_weights.safetensors").read_bytes()
    assert (run / "pytorch_lora_weights.safetensors").read_bytes() == saved
    assert all(np.isfinite(tensor).all() for tensor in safetensors.numpy.load(saved).values())
    assert [
        json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()
    ] == [0]


def test_resume_where_nothing_has_run_starts_at_step_0_and_says_so(home, cache_fp16, caplog):
    (home / "run").mkdir()
    with caplog.at_level(logging.INFO, logger="wanlora"):
        result = cli.invoke(
            "train", "--cache", cache_fp16, "--output-dir", "run", "--max-steps", 1, "--resume",
            "--set", "lora.rank=2",
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert re.search(r"\brun .*checkpoint .*step 0", caplog.text)
    assert "trained steps 0 to 0" in result.output


# --- models and devices --------------------------------------------------------------------------

COMMANDS = {
    "cache-latents": ("--manifest", "train.jsonl"),
    "train": ("--model", HUB_MODEL),
    "sample": ("--prompt", "x"),
}


def _tripwire(*arguments, **settings):
    raise AssertionError("a download was tried")


@pytest.fixture
def inputs(home, cache_fp16) -> dict[str, tuple]:
    """Commands that want the default model and lack nothing else."""
    write_npz(home / "clip.npz", num_frames=5)
    (home / "train.jsonl").write_text('{"npz": "clip.npz", "prompt": "x"}\n')
    return COMMANDS | {"train": (*COMMANDS["train"], "--cache", cache_fp16)}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_default_model_on_a_machine_without_a_gpu(home, inputs, command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", _tripwire)
    before = files_in(home)
    message = cli.refuses(command, *inputs[command])
    assert HUB_MODEL in message
    assert "NVIDIA driver" in message
    assert f"torch {torch.__version__} built" in message
    assert "install" in message or "update the driver" in message
    assert "--device cpu" in message
    assert "--model micro" in message
    assert files_in(home) == before


def test_a_plan_needs_no_gpu_and_no_weights(home, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    before = files_in(home)
    planned = cli.invoke("cache-latents", *inputs["cache-latents"], "--dry-run", "--json")
    assert planned.exit_code == 0, planned.output
    found = json.loads(planned.stdout)
    assert (found["clips_encoded"], found["prompts_encoded"]) == (1, 3)  # its own, "", negative
    assert found["num_bytes"] > 0
    assert files_in(home) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_hub_model_without_a_network(home, inputs, command, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    before = files_in(home)
    message = cli.refuses(command, *inputs[command], "--device", "cpu")
    parts = {
        "cache-latents": "'vae/*' 'text_encoder/*' 'tokenizer/*' --local-dir",
        "train": "'transformer/*' --local-dir",
        "sample": "'vae/*' 'text_encoder/*' 'tokenizer/*' 'transformer/*' 'scheduler/*'",
    }
    assert f"hf download {HUB_MODEL} --include model_index.json {parts[command]}" in message
    assert "then pass --model FOLDER" in message
    assert files_in(home) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_is_none(home, inputs, command, monkeypatch):
    """What is wrong is the name, not the machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = cli.refuses(command, *inputs[command], "--model", "mikro")
    assert re.search(r"\bmikro\b.*\bmicro\b", message)
    (home / "folder").mkdir()
    message = cli.refuses(command, *inputs[command], "--model", "./folder")
    assert "diffusers' layout" in message


@pytest.mark.parametrize("device", ["cuda:99", "mps"])
def test_a_device_that_is_not_there(home, inputs, device, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    message = cli.refuses("sample", *inputs["sample"], "--device", device)
    assert f"device {device} does not work" in message
    assert len(message) < 600


# --- adapters ------------------------------------------------------------------------------------


def sample_with(adapter: object, **flags: object) -> str:
    return cli.refuses(
        "sample", "--adapter", adapter, "--model", "micro", "--prompt", "x", *TINY_VIDEO,
        "--output", "x.mp4",
    )  # fmt: skip


def test_an_adapter_that_is_missing_or_none(home, micro_home):
    (home / "run").mkdir()
    (home / "text.safetensors").write_text("these are no weights " * 20)
    before = files_in(home)
    assert "nowhere" in sample_with("nowhere")
    assert "saved" in sample_with("run")
    assert "text.safetensors is not" in sample_with("text.safetensors")
    assert files_in(home) == before
    safetensors.numpy.save_file({"model.weight": np.zeros((2, 2))}, home / "text.safetensors")
    message = sample_with("text.safetensors")
    assert "text.safetensors" in message
    assert "model.weight" in message


def test_an_adapter_for_another_model(home, micro_home):
    name = "transformer.blocks.0.attn1.to_q.lora"
    tensors = {f"{name}_A.weight": np.zeros((4, 1536)), f"{name}_B.weight": np.zeros((1536, 4))}
    (home / "run").mkdir()
    safetensors.numpy.save_file(tensors, home / "run" / "pytorch_lora_weights.safetensors")
    before = files_in(home)
    message = sample_with("run")
    assert "lora_A.weight: expected (4, 128), found (4, 1536)" in message
    assert "--model" in message
    assert files_in(home) == before
