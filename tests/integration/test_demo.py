"""The demo, whole: it runs the commands it prints, it teaches, and it continues after a kill."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import cli
from wanlora.commands.demo.demo import STEPS

COMMANDS = list(STEPS[1:-1])


def commands_of(stderr):
    return re.findall(r"^\$ wanlora (\S+)", stderr, re.MULTILINE)


@pytest.mark.slow
def test_the_demo_teaches_what_the_base_has_never_seen(tmp_path):
    done = cli.run("demo", "--output-dir", tmp_path / "demo", "--json", timeout=1800)
    found = json.loads(done.stdout)
    assert found["held_out"]["ci95"][1] < 0
    assert found["base_share"] <= 0.1
    assert found["adapter_share"] >= 0.5
    assert found["cached_s"] < found["one_stage_s"]
    assert commands_of(done.stderr) == COMMANDS
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "clapping" in page
    assert "data:image/gif;base64," in page
    again = cli.run("demo", "--output-dir", tmp_path / "demo", "--json")
    assert json.loads(again.stdout) == found
    assert commands_of(again.stderr) == []


MOMENTS = (
    "videos/clapping/*.mp4", "data/train.jsonl", "cache/store.zarr", "run/config.toml",
    "run/checkpoints/step-000050", "evaluation/*", "comfyui.safetensors",
)  # fmt: skip
"""Files at whose appearance the demo is killed."""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="POSIX process groups")
def test_a_demo_killed_again_and_again_ends_as_any_other(tmp_path):
    root = tmp_path / "demo"
    settings = ("demo", "--output-dir", root, "--max-steps", 60, "--known-videos", 0)
    for moment in MOMENTS:
        kill_at(root, moment, cli.command(*settings))
    done = cli.run(*settings, "--json", timeout=1800)
    assert json.loads(done.stdout)["clips"] == 48
    assert not set(commands_of(done.stderr)) & {"prepare", "cache-latents", "train"}
    steps = [json.loads(row)["step"] for row in (root / "run/metrics.jsonl").open()]
    assert steps == list(range(60))
    assert (root / "report.html").exists()


def kill_at(root: Path, moment: str, command: list[str]) -> None:
    """Run a demo in its own process group, and kill all of it when a file has appeared."""
    process = subprocess.Popen(
        command, env=os.environ | cli.ENVIRONMENT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 900
    while not list(root.glob(moment)):
        assert process.poll() is None, f"the demo ended before {moment}"
        assert time.monotonic() < deadline, moment
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
