"""A run with 8-bit weights: its files, its continuation, and the base of its adapters."""

import json
import re
import shutil

import pytest
import safetensors

from tests.support import cli

NAME = "pytorch_lora_weights.safetensors"
SMALL = ("--device", "cpu", "--batch-size", 2, "--save-steps", 2, "--set", "lora.rank=2",
         "--set", "optimizer.warmup_steps=0", "--set", "validation.num_clips=2",
         "--set", "validation.num_sigmas=2", "--set", "keep_checkpoints=0",
         "--set", "trackers=[]")  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, held_out_cache):
    """A run of four steps on an int8 base."""
    folder = tmp_path_factory.mktemp("quantized") / "run"
    done = cli.run(
        "train", "--cache", held_out_cache, "--output-dir", folder, "--quantize", "int8",
        "--max-steps", 4, *SMALL,
    )  # fmt: skip
    assert "int8" in done.stderr
    return folder


def header(folder):
    with safetensors.safe_open(folder / NAME, "pt") as opened:
        return opened.metadata()


def test_the_format_is_recorded_and_a_continued_run_has_the_same_bits(
    run_dir, tmp_path, held_out_cache
):
    assert header(run_dir)["wanlora.quantize"] == "int8"
    assert "int8" in (run_dir / "README.md").read_text()
    part = tmp_path / "part"
    cli.run(
        "train", "--cache", held_out_cache, "--output-dir", part, "--quantize", "int8",
        "--max-steps", 2, *SMALL,
    )  # fmt: skip
    resume = ("train", "--resume", "--output-dir", part, "--max-steps", 4)
    for other in ("none", "fp8"):
        assert re.search(f"quantize.*int8.*{other}", cli.refuses(*resume, "--quantize", other))
    # Streamed blocks change no bit either.
    cli.run(*resume, "--stream-blocks", 2, "--activations", "selective")
    assert (part / NAME).read_bytes() == (run_dir / NAME).read_bytes()


def test_a_run_without_quantization_has_no_trace_of_it(run_dir, tmp_path, held_out_cache):
    plain = tmp_path / "plain"
    cli.run("train", "--cache", held_out_cache, "--output-dir", plain, "--max-steps", 4, *SMALL)
    assert "wanlora.quantize" not in header(plain)
    assert header(plain)["wanlora.base"] == header(run_dir)["wanlora.base"]
    rows = [
        [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
        for folder in (plain, run_dir)
    ]
    for theirs, ours in zip(*rows, strict=True):
        assert theirs["panel"] != ours["panel"]
        assert theirs["base_mean"] != ours["base_mean"]
        assert ours["base_mean"] == pytest.approx(theirs["base_mean"], rel=0.01)
    message = cli.refuses(
        "evaluate", "--cache", held_out_cache, "--adapter", plain, "--adapter", run_dir,
        "--output-dir", tmp_path / "both",
    )  # fmt: skip
    assert "--quantize" in message
    assert str(run_dir / NAME) in message


def test_adapters_are_compared_and_sampled_on_the_base_of_their_training(
    run_dir, tmp_path, held_out_cache
):
    evaluate = ("evaluate", "--cache", held_out_cache, "--adapter", run_dir, "--device", "cpu",
                "--videos-per-activity", 0, "--num-clips", 2, "--set", "num_sigmas=2")  # fmt: skip
    found = {}
    for name, words in {"as trained": (), "none": ("--quantize", "none")}.items():
        folder = tmp_path / name
        cli.run(*evaluate, *words, "--output-dir", folder)
        found[name] = json.loads((folder / "evaluation.json").read_text())
    assert found["as trained"]["quantize"] == "int8"
    assert "quantize" not in found["none"]
    bases = [each["validation"]["base"] for each in found.values()]
    assert bases[0] != bases[1]
    video = tmp_path / "a.mp4"
    cli.run(
        "sample", "--adapter", run_dir, "--device", "cpu", "--prompt", "x", "--num-frames", 5,
        "--height", 32, "--width", 48, "--steps", 1, "--output", video,
    )  # fmt: skip
    assert json.loads(video.with_suffix(".json").read_text())["quantize"] == "int8"


def test_a_merged_model_has_the_bases_own_weights(run_dir, tmp_path, micro_folder):
    from safetensors.torch import load_file

    cli.run("export", "--adapter", run_dir, "--format", "merged", "--output", tmp_path / "merged")
    name = "blocks.0.attn1.norm_q.weight"
    [merged] = (tmp_path / "merged" / "transformer").glob("*.safetensors")
    [base] = (micro_folder / "transformer").glob("*.safetensors")
    ours, theirs = load_file(merged), load_file(base)
    assert ours.keys() == theirs.keys()
    assert {tensor.dtype for tensor in ours.values()} == {t.dtype for t in theirs.values()}
    assert (ours[name] == theirs[name]).all()


def test_dora_is_refused(run_dir, tmp_path, held_out_cache):
    message = cli.refuses(
        "train", "--cache", held_out_cache, "--output-dir", tmp_path, "--quantize", "int8",
        "--set", "lora.dora=true", exit_code=2,
    )  # fmt: skip
    assert "DoRA" in message
    dora = tmp_path / "dora"
    cli.run("train", "--cache", held_out_cache, "--output-dir", dora, "--max-steps", 1,
            "--set", "lora.dora=true", "--set", "validation.every=0", *SMALL)  # fmt: skip
    shutil.rmtree(dora / "checkpoints")
    for command in (("evaluate", "--cache", held_out_cache), ("sample", "--prompt", "x")):
        message = cli.refuses(*command, "--adapter", dora, "--quantize", "int8")
        assert "--quantize none" in message
