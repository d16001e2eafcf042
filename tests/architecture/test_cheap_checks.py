"""A mistake on the command line is refused before seconds of imports. Counted, not timed."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tests.support.caches import write_npz_clips
from tests.support.cli import ENVIRONMENT
from tests.support.server import Server
from tests.support.stores import build_store
from wanlora.config import COMMANDS

HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate"}

PROMPT = ("--prompt", "a dog")
TO_PEFT = ("--format", "peft", "--output", "peft")
REFUSED = {
    "prepare": [
        ("nowhere",), ("videos", "--captions", "nowhere.csv"), ("videos", "--output", "file"),
        ("videos", "--fps", "many"), ("videos", "--num-frames", 80), ("videos", "--nonsense"),
    ],
    "verify": [("nowhere.jsonl",), ("file",), ("data", "--limit", "many"), ("data", "--nonsense")],
    "cache-latents": [
        ("--manifest", "nowhere.jsonl"), ("--manifest", "data", "--model", "./nowhere"),
        ("--manifest", "data", "--model", "empty"), ("--manifest", "data", "--cache", "file"),
        ("--set", "store.dtype=float9"), ("--nonsense",),
    ],
    "inspect": [
        ("nowhere",), ("empty",), ("file",), ("damaged.safetensors",), ("foreign.safetensors",),
        ("cache", "--verify", "much"), ("cache", "--decode", "nobody"), ("cache", "--nonsense"),
    ],
    "estimate": [
        ("--cache", "nowhere"), ("--cache", "cache", "--view", "other"), ("--model", "./nowhere"),
        ("--device", "voodoo2"), ("--clips", -1), ("--nonsense",),
    ],
    "train": [
        ("--cache", "nowhere"), ("--cache", "cache", "--view", "other"),
        ("--cache", "cache", "--manifest", "nowhere.jsonl"),
        ("--cache", "cache", "--set", "split=nothing"),
        ("--cache", "cache", "--set", "clip_weights.nothing=2"),
        ("--cache", "cache", "--init-adapter", "nowhere"),
        ("--cache", "cache", "--init-adapter", "foreign.safetensors"),
        ("--cache", "cache", "--model", "./nowhere"), ("--cache", "cache", "--model", "empty"),
        ("--cache", "cache", "--model", "micro"),  # it does not read what is cached
        ("--set", "lora.rank=0"), ("--config", "nowhere.toml"), ("--nonsense",),
    ],
    "sample": [
        ("--adapter", "nowhere", *PROMPT), ("--adapter", "file", *PROMPT),
        ("--adapter", "foreign.safetensors", *PROMPT), ("--prompts", "nowhere.txt"),
        ("--cache", "nowhere"), ("--model", "./nowhere", *PROMPT), ("--model", "empty", *PROMPT),
        ("--model", "micro", *PROMPT, "--height", 100), ("--output-dir", "file", *PROMPT),
        ("--latents", "nowhere"), ("--steps", 0, *PROMPT), ("--nonsense",),
    ],
    "evaluate": [
        ("--adapter", "nowhere", "--cache", "cache"),
        ("--adapter", "ours.safetensors", "--cache", "nowhere"),
        ("--adapter", "ours.safetensors", "--cache", "cache", "--set", "split=nothing"),
        ("--adapter", "ours.safetensors", "--cache", "cache", "--model", "./nowhere"),
        ("--adapter", "ours.safetensors", "--cache", "cache", "--output-dir", "file"),
        ("--nonsense",),
    ],
    "export": [
        ("--adapter", "nowhere", *TO_PEFT), ("--adapter", "foreign.safetensors", *TO_PEFT),
        ("--adapter", "ours.safetensors", "--format", "peft", "--output", "file"),
        ("--adapter", "ours.safetensors", "--checkpoint", "best", *TO_PEFT),
        ("--adapter", "ours.safetensors", "--format", "merged", "--output", "x",
         "--model", "./nowhere"),
        ("--adapter", "ours.safetensors", "--push", "someone/name"), ("--nonsense",),
    ],
    "watch": [("nowhere",), ("file",), ("empty", "--port", "many"), ("empty", "--nonsense")],
    "config": [("nothing",), ("--nonsense",)],
    "run": [("nowhere.toml",), ("file",), ("--nonsense",)],
    "demo": [("--output-dir", "old"), ("--output-dir", "file"), ("--nonsense",)],
}  # fmt: skip

LIGHT = [("inspect", "cache", "--verify"), ("estimate", "--cache", "cache"), ("estimate",)]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A working directory with one of everything."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("videos", "empty", "old/run"):
        (folder / name).mkdir(parents=True)
    (folder / "file").write_text("text\n")
    (folder / "damaged.safetensors").write_bytes(b"\xff" * 64)
    matrices = {"lora_A": np.ones((2, 8), np.float32), "lora_B": np.ones((8, 2), np.float32)}
    for name, module in (("foreign", "unet.conv_in"), ("ours", "transformer.blocks.0.attn1.to_q")):
        tensors = {f"{module}.{key}.weight": value for key, value in matrices.items()}
        safetensors.numpy.save_file(tensors, folder / f"{name}.safetensors")
    write_npz_clips(folder / "data", num_clips=1, size=(5, 32, 32))
    build_store(folder / "cache")
    return folder


@pytest.fixture(scope="module")
def server():
    server = Server(["wanlora.cli", "zarr", "av", "PIL.Image"], os.environ | ENVIRONMENT)
    yield server
    server.close()


def test_each_command_has_its_mistakes_here():
    assert set(REFUSED) == set(COMMANDS)


@pytest.mark.parametrize(
    "arguments", [(name, *words) for name, every in REFUSED.items() for words in every], ids=str
)
def test_a_mistake_is_refused_without_torch(server, home, arguments):
    code, message, modules = server.imported(arguments, cwd=home)
    assert code in (1, 2), message
    assert message.strip()
    assert "Traceback" not in message
    assert not modules & HEAVY


def test_train_refuses_a_folder_with_an_adapter_without_torch(server, home):
    run_dir = home / "done"
    run_dir.mkdir()
    shutil.copy(home / "ours.safetensors", run_dir / "pytorch_lora_weights.safetensors")
    arguments = ("train", "--cache", "cache", "--output-dir", "done")
    code, message, modules = server.imported(arguments, cwd=home)
    assert code == 1
    assert "done/pytorch_lora_weights.safetensors" in message
    assert not modules & HEAVY


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_what_needs_no_torch_imports_none(server, home, arguments):
    code, message, modules = server.imported(arguments, cwd=home)
    assert code == 0, message
    assert not modules & HEAVY
