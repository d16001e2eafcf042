"""Figures of docs/i2v.md are those of `wanlora estimate`."""

import json
import re

import pytest

from tests.support import cli
from tests.support.doc_blocks import ROOT

ROW = re.compile(
    r"\| (\d+)×480×832 \| `([\w-]+)` \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) PFLOP \|"
)
ROWS = ROW.findall((ROOT / "docs" / "i2v.md").read_text(encoding="utf-8"))


def test_the_table_has_both_models_at_two_lengths():
    assert len(ROWS) == 4


@pytest.mark.parametrize(("frames", "variant", "selective", "full", "pflop"), ROWS)
def test_memory_and_work_are_counted(frames, variant, selective, full, pflop):
    done = cli.invoke(
        "estimate", "--variant", variant, "--device", "h100", "--frames", frames, "--json",
        "--set", "stream_blocks=0",
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["modes"]["selective"]["peak_gb"] == pytest.approx(float(selective), rel=5e-3)
    assert found["modes"]["full"]["peak_gb"] == pytest.approx(float(full), rel=2e-3)
    assert found["tflop_per_step"] / 1000 == pytest.approx(float(pflop), rel=3e-3)
