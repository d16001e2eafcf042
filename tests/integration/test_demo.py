"""The demo, whole: every command that it prints is typed for real, and it teaches."""

import json
import re

import pytest

from tests.support import cli

COMMANDS = [
    "prepare", "verify", "cache-latents", "inspect", "estimate", "train", "evaluate", "export",
]  # fmt: skip


@pytest.mark.slow
def test_the_demo_teaches_what_the_base_has_never_seen(tmp_path):
    done = cli.run("demo", "--output-dir", tmp_path / "demo", "--json", timeout=1800)
    found = json.loads(done.stdout)
    assert found["held_out"]["ci95"][1] < 0
    assert found["base_share"] <= 0.1
    assert found["adapter_share"] >= 0.5
    assert found["cached_s"] < found["one_stage_s"]
    printed = re.findall(r"^\$ wanlora (\S+)", done.stderr, re.MULTILINE)
    assert printed == COMMANDS
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "clapping" in page
    assert "data:image/gif;base64," in page
    refused = cli.refuses("demo", "--output-dir", tmp_path / "demo")
    assert "already holds a demo" in refused
