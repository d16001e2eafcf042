"""Training of image-to-video models: what a run reads and records, resumes, and refuses."""

import json
import shlex
import shutil

import pytest
import safetensors

from tests.support import cli
from tests.support.i2v import i2v_folder
from wanlora.store.views import read_view

NAME = "pytorch_lora_weights.safetensors"
SMALL = ("--device", "cpu", "--set", "lora.rank=2", "--set", "optimizer.warmup_steps=0",
         "--set", "validation.num_clips=1", "--set", "validation.num_sigmas=2",
         "--set", "validation.train_clips=false", "--set", "trackers=[]")  # fmt: skip
FP32 = ("--device", "cpu", "--set", "store.dtype=float32", "--set", "text_dtype=float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, held_out_cache):
    """A model with CLIP, a text-to-video cache as it was, and the command that a run asked for."""
    path = tmp_path_factory.mktemp("i2v")
    i2v_folder(path / "model", clip=True)
    shutil.copytree(held_out_cache, path / "cache")
    return path


@pytest.fixture(scope="module")
def encoded(folder, held_out_cache):
    """The cache after the command in the refusal of a run on a view without conditions."""
    train = ("train", "--cache", folder / "cache", "--model", folder / "model",
             "--output-dir", folder / "refused", *SMALL)  # fmt: skip
    refusal = cli.refuses(*train)
    assert "cond_latents and clip_vision" in refusal
    assert not (folder / "refused").exists()
    command = refusal[refusal.index("wanlora cache-latents") :].splitlines()[0]
    words = shlex.split(command)
    assert words[words.index("--model") + 1] == str(folder / "model")
    done = cli.run(*words[1:], "--manifest", held_out_cache.parent / "data", *FP32)
    assert "0 prompts" in done.stderr
    view = read_view(folder / "cache", "default")
    assert view.kinds == ("latents", "text", "cond_latents", "clip_vision")
    assert view.fingerprint("latents") == read_view(held_out_cache, "default").fingerprint(
        "latents"
    )
    return folder / "cache"


def losses(run_dir):
    rows = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


def test_a_run_reads_and_records_its_conditions_and_resumes_bit_for_bit(encoded, folder, tmp_path):
    train = ("train", "--cache", encoded, "--model", folder / "model", "--learning-rate", 1e-3,
             "--set", "condition_dropout=0.5", *SMALL)  # fmt: skip
    whole = cli.run(*train, "--output-dir", tmp_path / "whole", "--max-steps", 4)
    assert f"sample --adapter {tmp_path / 'whole'} --image " in whole.stdout
    cli.run(*train, "--output-dir", tmp_path / "parts", "--max-steps", 2)
    shutil.copy(encoded / "views" / "default.jsonl", encoded / "views" / "same.jsonl")
    done = cli.run("train", "--resume", "--output-dir", tmp_path / "parts", "--max-steps", 4,
                   "--view", "same")  # fmt: skip
    assert "continuing from" in done.stderr
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    files = [tmp_path / run / NAME for run in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()

    view = read_view(encoded, "default")
    with safetensors.safe_open(files[0], "pt") as opened:
        header, keys = opened.metadata(), list(opened.keys())
    assert header["wanlora.variant"] == "micro-i2v-clip"
    for kind in ("cond_latents", "clip_vision"):
        assert header[f"wanlora.{kind}"] == view.fingerprint(kind)
    assert "transformer.blocks.0.attn2.add_k_proj.lora_A.weight" in keys
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "image-to-video" in card
    assert "| condition dropout | 0.5 |" in card
    changed = cli.refuses("train", "--resume", "--output-dir", tmp_path / "parts",
                          "--set", "condition_dropout=0.1")  # fmt: skip
    assert "condition_dropout" in changed


def test_a_text_to_video_run_on_the_view_is_that_on_a_view_without_conditions(
    encoded, held_out_cache, tmp_path
):
    for name, cache in (("with", encoded), ("without", held_out_cache)):
        cli.run("train", "--cache", cache, "--model", "micro", "--output-dir", tmp_path / name,
                "--max-steps", 2, "--set", "validation.every=0", *SMALL)  # fmt: skip
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    refusal = cli.refuses(
        "train", "--cache", encoded, "--model", "micro", "--output-dir", tmp_path / "run",
        "--set", "condition_dropout=0.1", exit_code=2,
    )  # fmt: skip
    assert "condition_dropout" in refusal
