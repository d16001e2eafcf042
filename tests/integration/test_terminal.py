"""Real commands in a terminal of 60, 80 and 120 columns; stdout has the result alone."""

import importlib
import json
import re

import pytest

from tests.support import cli, terminal
from tests.support.server import script
from wanlora.cli import STAGES

FIGURE = r"(loss|lr|mfu|data|mem|video|encoder waits)? ?[\d.e+/-]+( ?%| GB| TFLOP/s)?"
BAR = re.compile(rf"[a-z ]+: \d+/\d+ (\|.*\| )?.*, [\d:?]+ left(, {FIGURE})*")
"""A bar's line, with no other text before or after it."""

CHATTY = """
import importlib, os, sys, json
from wanlora import cli
words = json.loads(sys.argv[1])
stage = importlib.import_module(cli.STAGES[words[0]])
run = stage.run
def chatty(config):
    print("a library prints")
    os.write(1, b"a C library prints\\n")
    os.system("echo a child process prints")
    return run(config)
stage.run = chatty
sys.argv = ["wanlora", *words]
cli.main()
"""


def _in_terminal(width, *arguments, **options):
    shown = terminal.run(*arguments, width=width, **options)
    bars = [row.rstrip() for row in shown.rows() if " left" in row]
    assert bars
    assert max(map(len, bars)) < width
    assert [bar for bar in bars if not BAR.fullmatch(bar)] == []
    return shown


def _only(shown, start):
    (line,) = [line for line in shown.lines if line.startswith(start)]
    return line


def test_commands_keep_log_lines_and_bars_apart(tmp_path, micro_home, npz_manifest):
    cache, run = "cache", "run"
    cached = _in_terminal(
        60,
        "cache-latents",
        "--manifest",
        npz_manifest,
        "--cache",
        cache,
        "--model",
        "micro",
        cwd=tmp_path,
    )
    assert cached.code == 0
    assert _only(cached, "next: wanlora train")
    assert "6/6" in _only(cached, "latents:")
    assert "latents of 6 clips" in _only(cached, "to encode: ")

    trained = _in_terminal(
        80, "train", "--cache", cache, "--output-dir", run, "--max-steps", 4,
        "--set", "previews.every=2", "--set", "previews.steps=2", "--set", "validation.every=2",
        "--set", "validation.num_clips=2", cwd=tmp_path,
    )  # fmt: skip
    assert trained.code == 0
    assert "loss" in _only(trained, "train: 4/4")
    assert "(9x32x48), none" in _only(trained, "6 clips to train")
    assert "6 steps" in _only(trained, "4 steps planned, 0.667 epochs")
    assert _only(trained, "training a LoRA of rank 32")
    assert _only(trained, "expected time: ")
    assert _only(trained, "watch: run/run.html")
    assert "run/checkpoints" in _only(trained, "checkpoints: ")
    assert len([line for line in trained.lines if line.startswith("validation after")]) == 2
    assert _only(trained, "adapter: ")

    sampled = _in_terminal(
        120, "sample", "--adapter", run, "--prompt", "A person walking", "--output-dir",
        "videos", "--set", "steps=3", cwd=tmp_path,
    )  # fmt: skip
    assert sampled.code == 0
    assert "3/3" in _only(sampled, "sample:")
    assert "9 frames, 32x48 px, 3 steps" in _only(sampled, "to make: 1 video")


def test_ctrl_c_leaves_a_usable_terminal(tmp_path, cache_fp16):
    stopped = _in_terminal(
        80, "train", "--cache", cache_fp16, "--output-dir", tmp_path, "--max-steps", 5000,
        "--set", "validation.every=0", until=lambda raw: b"step/s" in raw or b"s/step" in raw,
    )  # fmt: skip
    assert stopped.code == 130
    assert _only(stopped, "train: ")
    assert _only(stopped, "warning: SIGINT")
    assert stopped.lines[-1]
    assert b"\x1b[?25l" not in stopped.raw  # the cursor was never hidden


@pytest.mark.parametrize("name", ["verify", "cache-latents", "inspect", "estimate"])
def test_json_is_the_only_thing_on_stdout(monkeypatch, name, cache_fp16, npz_manifest):
    words = {
        "verify": [npz_manifest],
        "cache-latents": ["--manifest", npz_manifest, "--cache", cache_fp16, "--model", "micro",
                          "--dry-run"],
        "inspect": [cache_fp16],
        "estimate": ["--cache", cache_fp16],
    }  # fmt: skip
    stage = importlib.import_module(STAGES[name])
    run = stage.run

    def chatty(config):
        print("a library prints")
        return run(config)

    monkeypatch.setattr(stage, "run", chatty)
    done = cli.invoke(name, *words[name], "--json")
    assert json.loads(done.stdout), done.output
    assert "a library prints" in done.stderr


def test_prints_of_c_libraries_and_of_child_processes_go_to_stderr(tmp_path, cache_fp16):
    arguments = json.dumps([
        "train", "--cache", str(cache_fp16), "--output-dir", str(tmp_path / "run"), "--max-steps",
        "1", "--set", "optimizer.name=prodigy", "--learning-rate", "1", "--json",
    ])  # fmt: skip
    done = cli.server().run(script(CHATTY, arguments))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 1
    for who in ("a library", "a C library", "a child process"):
        assert f"{who} prints" in done.stderr
