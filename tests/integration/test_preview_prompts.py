"""Prompts of previews, as in training.md: encoded before training, once per cache."""

import json
import os
import shutil
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch

from tests.support import cli
from wanlora.commands.cache_latents import preview_prompts
from wanlora.commands.train import prompts
from wanlora.config import PreviewSettings
from wanlora.core.location import prompt_home
from wanlora.core.prompts import prompt_key
from wanlora.errors import ModelError
from wanlora.runs import run_folder
from wanlora.runs.saved_latents import read_latents
from wanlora.store import index
from wanlora.store.row_reader import RowReader
from wanlora.store.views import read_view
from wanlora.wan import encoders

CPU = torch.device("cpu")
TEXTS = ("A person <clapping>, at dusk", "-5 degrees, snow")
FLAGS = tuple(f"--preview-prompt={text}" for text in TEXTS)
SHORT = ("--set", "lora.rank=2", "--set", "lora.targets=attention", "--set", "validation.every=0",
         "--set", "trackers=[]", "--set", "previews.steps=1")  # fmt: skip


@pytest.fixture
def cache(held_out_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("WANLORA_CACHE_HOME", str(tmp_path / "home"))
    return shutil.copytree(held_out_cache, tmp_path / "cache")


def rows(place, cache):
    text = read_view(cache, "default").fingerprint("text")
    reader = RowReader.of_generation(place, "text", text, index.committed(place, "text", text))
    return {key: reader.read(key) for key in map(prompt_key, TEXTS) if key in list(reader.rows)}


def test_own_prompts_are_shown_from_step_0_and_encoded_once(
    cache, micro_folder, tmp_path, monkeypatch
):
    train = ("train", "--cache", cache, *SHORT, "--max-steps", 2, *FLAGS)
    done = cli.invoke(*train, "--output-dir", tmp_path / "run")
    assert done.exit_code == 0, done.output
    folder = tmp_path / "run" / run_folder.PREVIEWS_NAME
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-000000", "step-000001", "step-000002"
    ]  # fmt: skip
    for index_, text in enumerate(TEXTS):
        shown = read_latents(folder / "step-000000" / f"{index_:02d}.safetensors")
        assert shown.facts["prompt"] == text
    encoder = encoders.load_text_encoder(
        micro_folder, dtype=torch.float32, device=torch.device("cpu")
    )
    found = rows(cache, cache)
    for text in TEXTS:
        (expected,) = encoders.encode_prompts(encoder, [text])
        assert np.array_equal(found[prompt_key(text)], expected.numpy())

    def never(*_):
        raise AssertionError("these prompts are in the cache")

    monkeypatch.setattr(prompts, "encode", never)
    again = cli.invoke(*train, "--output-dir", tmp_path / "again")
    assert again.exit_code == 0, again.output
    name = "pytorch_lora_weights.safetensors"
    plain = cli.invoke(*train[:-2], "--output-dir", tmp_path / "plain")
    assert plain.exit_code == 0, plain.output
    losses = [
        [row["loss"] for row in run_folder.read_rows(tmp_path / run, run_folder.METRICS_NAME)]
        for run in ("run", "again", "plain")
    ]
    assert losses[0] == losses[1] == losses[2]  # previews change no step
    assert (tmp_path / "plain" / name).exists()


def test_a_cache_that_cannot_be_written_leaves_the_embeddings_with_the_user(cache, monkeypatch):
    monkeypatch.setattr(preview_prompts, "_is_writable", lambda _: False)
    done = cli.invoke("cache-latents", "--cache", cache, *FLAGS, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["prompts_encoded"] == 2
    assert rows(cache, cache) == {}
    assert len(rows(prompt_home(), cache)) == 2
    again = json.loads(cli.invoke("cache-latents", "--cache", cache, *FLAGS, "--json").stdout)
    assert (again["prompts_encoded"], again["prompts_cached"]) == (0, 2)


def test_writability_is_tried_and_leaves_nothing(tmp_path):
    assert preview_prompts._is_writable(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not preview_prompts._is_writable(tmp_path / "absent")


def test_without_the_text_encoder_the_whole_error_and_the_command_are_shown(cache):
    path = cache / "views" / "default.jsonl"
    header, *clips = path.read_text().splitlines()
    header = json.dumps(json.loads(header) | {"model": "/nowhere/wan"}, sort_keys=True)
    path.write_text("\n".join([header, *clips]) + "\n")
    with pytest.raises(ModelError) as refused:
        prompts.encode(cache, "default", TEXTS, CPU, model=None, view_model="/nowhere/wan")
    said = str(refused.value)
    assert "/nowhere/wan" in said
    assert f"wanlora cache-latents --cache {cache} --view default" in said
    assert "'--preview-prompt=A person <clapping>, at dusk'" in said


@pytest.mark.parametrize(
    ("view_model", "model", "passed"),
    [("/nowhere/wan", "micro", True), ("micro", "micro", False), ("/nowhere/wan", None, False),
     ("/nowhere/wan", "/nowhere/else", False)],
)  # fmt: skip
def test_the_runs_model_replaces_a_model_of_the_view_that_is_gone(
    tmp_path, monkeypatch, view_model, model, passed
):
    words = tmp_path / "words"
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho "$@" > {words}\n')
    fake.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(fake))
    prompts.encode(tmp_path, "default", TEXTS, CPU, model=model, view_model=view_model)
    assert (" --model micro " in words.read_text()) == passed


def test_a_signal_ends_the_process_that_encodes(tmp_path, monkeypatch):
    slow, pid = tmp_path / "python", tmp_path / "pid"
    slow.write_text(f"#!/bin/sh\necho $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 60\n")
    slow.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(slow))

    def interrupt():
        while not pid.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        prompts.encode(tmp_path, "default", TEXTS, CPU, model=None, view_model="micro")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_prompts_are_encoded_without_a_manifest_or_not_at_all(cache, tmp_path):
    said = cli.refuses(
        "cache-latents", "--cache", cache, *FLAGS, "--manifest", tmp_path, exit_code=2
    )
    assert "manifest" in said
    assert "no view 'other'" in cli.refuses(
        "cache-latents", "--cache", cache, *FLAGS, "--view", "other"
    )


@pytest.mark.parametrize(
    ("settings", "end_step", "period"),
    [({}, 100, 0), ({"prompts": ("a",)}, 100, 25), ({"prompts": ("a",)}, 9000, 500),
     ({"prompts": ("a",)}, 1, 1), ({"prompts": ("a",), "every": 0}, 100, 0),
     ({"every": 7}, 100, 7)],
)  # fmt: skip
def test_own_prompts_are_shown_about_five_times_or_every_500_steps(settings, end_step, period):
    assert PreviewSettings(**settings).period(end_step) == period
