"""Clips, manifests and caches made by the real commands, once a test process."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support import cli

CAPTIONS = (
    "A person clapping their hands",
    "A person sitting down",
    "A person walking  to the left &amp; back",  # cleaned by every reader in the same way
    "A person clapping their hands",  # the same words: one embedding for two clips
    "Two people walking",
    "A person, sitting",
)
FRAMES, HEIGHT, WIDTH = 9, 32, 48


def write_npz_clips(
    folder: Path, *, num_clips: int = len(CAPTIONS), size=(FRAMES, HEIGHT, WIDTH), seed: int = 0
) -> Path:
    """Write clips as the seed's preprocessing does, and return their `train.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    lines = []
    for index in range(num_clips):
        frames, height, width = size
        # Smooth, so that it is more like video than like noise, and different for each clip.
        small = random.integers(0, 256, (frames, height // 8, width // 8, 3), dtype=np.uint8)
        clip = small.repeat(8, axis=1).repeat(8, axis=2)
        np.savez_compressed(folder / f"clip-{index:03d}.npz", frames=clip)
        caption = CAPTIONS[index % len(CAPTIONS)]
        lines.append({"npz": f"clip-{index:03d}.npz", "prompt": caption})
    manifest = folder / "train.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest


@pytest.fixture(scope="session")
def npz_manifest(tmp_path_factory) -> Path:
    return write_npz_clips(tmp_path_factory.mktemp("npz") / "processed")


def _cache(tmp_path_factory, manifest: Path, dtype: str) -> Path:
    cache = tmp_path_factory.mktemp(f"cache-{dtype}")
    cli.run(
        "cache-latents", "--manifest", manifest, "--cache", cache, "--model", "micro",
        "--set", f"store.dtype={dtype}", "--set", "text_dtype=float32",
    )  # fmt: skip
    return cache


@pytest.fixture(scope="session")
def cache_fp32(tmp_path_factory, micro_home, npz_manifest) -> Path:
    """Six clips of 9x32x48 px in fp32, for parity."""
    return _cache(tmp_path_factory, npz_manifest, "float32")


@pytest.fixture(scope="session")
def cache_fp16(tmp_path_factory, micro_home, npz_manifest) -> Path:
    """The same clips as they are stored by default."""
    return _cache(tmp_path_factory, npz_manifest, "float16")


@pytest.fixture(scope="session")
def held_out_cache(tmp_path_factory, micro_home) -> Path:
    """Nine clips of 5x32x32 px of three activities in fp32, three of them held out."""
    folder = tmp_path_factory.mktemp("held-out")
    manifest = write_npz_clips(folder / "data", num_clips=9, size=(5, 32, 32))
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for index, line in enumerate(lines):
        line["activity"] = ("clap", "sit", "walk")[index % 3]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines[:6]))
    held_out = manifest.with_name("val.jsonl")
    held_out.write_text("".join(json.dumps(line) + "\n" for line in lines[6:]))
    done = cli.invoke(
        "cache-latents", "--manifest", folder / "data", "--cache", folder / "cache",
        "--model", "micro", "--set", "store.dtype=float32", "--set", "text_dtype=float32",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder / "cache"
