"""kill -9 in the middle of stage one, then the same command again."""

import json
import random
import shutil
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.support import cli
from tests.support.hooks import num_committed, record_encodings
from wanlora.commands.cache_latents.prefetch import MAX_WAITING

CLIPS, ROWS = 30, 2
PROMPTS = CLIPS + 1
"""Each clip has its own caption; and the empty prompt."""


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(CLIPS):
        frames = rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
        np.savez(folder / f"clip-{i:02d}.npz", frames=frames)
    return write_manifest(folder, {f"clip-{i:02d}": f"caption {i}" for i in range(CLIPS)})


def write_manifest(folder: Path, captions: dict[str, str]) -> Path:
    lines = [{"npz": f"{name}.npz", "prompt": text} for name, text in captions.items()]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def arguments(data: Path) -> list[str]:
    return [
        "cache-latents", "--manifest", str(data), "--cache", str(data.parent / "cache"),
        "--model", "micro", "--set", f"store.clips_per_segment={ROWS}", "--json",
    ]  # fmt: skip


def run(data: Path, kind: str = "latents", rows: int = 0, more: int = 0) -> str:
    """Run stage one, to its end or to its kill; see `record_encodings`. Returns its output."""
    recording = partial(
        record_encodings, data.parent / "encoded.log", cache=data.parent / "cache", kind=kind,
        rows=rows, more=more,
    )  # fmt: skip
    code = -signal.SIGKILL if rows else 0
    return cli.run(*arguments(data), before=[recording], exit_code=code).stdout


def num_encoded(data: Path) -> Counter:
    return Counter((data.parent / "encoded.log").read_text().split())


def inspected(data: Path, exit_code: int = 0) -> dict:
    result = cli.invoke("inspect", data.parent / "cache", "--verify", "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def test_a_killed_run_costs_at_most_a_segment_of_each_kind(data, micro_home):
    moments = random.Random(0)
    for kind, rows in (("text", 8), ("latents", 8)):
        run(data, kind, rows, moments.randrange(4))
        committed = num_committed(data.parent / "cache")
        found = inspected(data)
        assert found["invalid"] == []
        assert (found["clips"], found["prompts"]) == (committed["latents"], committed["text"])
        assert found["verified"] == sum(committed.values())
        assert found["views"] == []  # nothing to train on yet
    assert rows <= committed["latents"] < CLIPS
    assert committed["text"] == PROMPTS

    result = json.loads(run(data))
    assert (result["clips"], result["clips_cached"]) == (CLIPS, committed["latents"])
    assert (result["prompts_encoded"], result["prompts_cached"]) == (0, PROMPTS)
    encoded = num_encoded(data)
    assert CLIPS <= encoded["latents"] <= CLIPS + ROWS + MAX_WAITING  # those not yet in a segment
    assert PROMPTS <= encoded["text"] <= PROMPTS + ROWS
    found = inspected(data)
    assert (found["clips"], found["prompts"], found["invalid"]) == (CLIPS, PROMPTS, [])
    assert found["views"][0]["clips"] == CLIPS


def test_only_what_is_new_is_encoded(data, micro_home):
    def again() -> tuple[int, int, int]:
        result = cli.invoke(*arguments(data))
        assert result.exit_code == 0, result.output
        summary = json.loads(result.stdout)
        return summary["clips"], summary["clips_encoded"], summary["prompts_encoded"]

    captions = {f"clip-{i:02d}": f"caption {i}" for i in range(CLIPS)}
    assert again() == (CLIPS, CLIPS, PROMPTS)
    assert again() == (CLIPS, 0, 0)
    write_manifest(data, captions | {"clip-03": "a caption somebody has mended"})
    assert again() == (CLIPS, 0, 1)
    write_manifest(data, captions)
    assert again() == (CLIPS, 0, 0)  # the old words are still there
    (data / "clip-05.npz").rename(data / "renamed.npz")
    shutil.copy(data / "clip-06.npz", data / "copy.npz")
    del captions["clip-05"]
    write_manifest(data, captions | {"renamed": "caption 5", "copy": "caption 6"})
    assert again() == (CLIPS + 1, 0, 0)
    (data / "clip-07.npz").write_bytes((data / "clip-08.npz").read_bytes())
    assert again() == (CLIPS + 1, 0, 0)  # other bytes under an old name, but known ones
    assert inspected(data)["invalid"] == []
