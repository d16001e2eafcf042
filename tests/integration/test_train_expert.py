"""Training one of the two transformers of a model: its range, its files, and what is refused."""

import json
import re
import shutil
import tomllib

import pytest
import safetensors

from tests.support import cli
from tests.support.experts import pair_folder
from wanlora.store.views import read_view

NAME = "pytorch_lora_weights.safetensors"
SUBFOLDERS = {"high": "transformer", "low": "transformer_2"}
SMALL = ("--device", "cpu", "--set", "lora.rank=2", "--set", "optimizer.warmup_steps=0",
         "--set", "validation.num_clips=2", "--set", "validation.num_sigmas=2",
         "--set", "trackers=[]")  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model with two transformers."""
    return pair_folder(tmp_path_factory.mktemp("pair") / "model")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pair, held_out_cache):
    """A run of each expert, and its log; each can read only its own transformer."""
    folder = tmp_path_factory.mktemp("runs")
    logs = {}
    for expert, other in (("high", "low"), ("low", "high")):
        hidden = pair / SUBFOLDERS[other]
        hidden.rename(folder / "hidden")
        done = cli.run(
            "train", "--cache", held_out_cache, "--model", pair, "--expert", expert,
            "--output-dir", folder / expert, "--max-steps", 2, *SMALL,
        )  # fmt: skip
        (folder / "hidden").rename(hidden)
        logs[expert] = done.stderr
    return folder, logs


def header(run_dir):
    with safetensors.safe_open(run_dir / NAME, "pt") as opened:
        return opened.metadata(), list(opened.keys())


@pytest.mark.parametrize(
    ("expert", "sigmas", "share"), [("high", (0.875, 1.0), 19.8), ("low", (0.0, 0.875), 80.2)]
)
def test_a_run_reads_and_records_only_its_expert(runs, expert, sigmas, share):
    folder, logs = runs
    run_dir = folder / expert
    assert f"{sigmas[0]:g} to {sigmas[1]:g}" in logs[expert]
    assert f"{share} %" in logs[expert]
    assert f"({SUBFOLDERS[expert]}/)" in logs[expert]
    assert re.search("previews: none.*wanlora sample", logs[expert])
    metadata, keys = header(run_dir)
    assert (metadata["wanlora.expert"], metadata["wanlora.variant"]) == (expert, "micro-a14b")
    assert all(key.startswith("transformer.") for key in keys)
    assert tomllib.loads((run_dir / "config.toml").read_text())["expert"] == expert
    rows = [json.loads(line) for line in (run_dir / "validation.jsonl").read_text().splitlines()]
    found = [sigma for row in rows for sigma, *_ in row["per_sigma"]]
    assert found
    assert all(sigmas[0] <= sigma < sigmas[1] for sigma in found)
    card = (run_dir / "README.md").read_text()
    assert f"{expert}-noise expert" in card
    assert f"range {sigmas[0]:g} to {sigmas[1]:g}" in card
    assert expert in (run_dir / "run.html").read_text()


def test_a_run_is_continued_with_its_expert_and_never_with_the_other(runs, tmp_path, pair):
    run_dir = shutil.copytree(runs[0] / "low", tmp_path / "low")
    resume = ("train", "--resume", "--output-dir", run_dir, "--max-steps", 3)
    message = cli.refuses(*resume, "--expert", "high")
    assert re.search("expert: found low.*high", message)
    cli.run(*resume)
    assert header(run_dir)[0]["wanlora.expert"] == "low"
    rows = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 1, 2]


def test_an_adapter_of_the_other_expert_is_used_and_named(runs, held_out_cache, tmp_path, pair):
    done = cli.run(
        "train", "--cache", held_out_cache, "--model", pair, "--expert", "low", "--max-steps", 1,
        "--init-adapter", runs[0] / "high", "--output-dir", tmp_path / "run",
        "--set", "validation.every=0", *SMALL,
    )  # fmt: skip
    warning = next(line for line in done.stderr.splitlines() if "--init-adapter" in line)
    assert re.search("high-noise.*low-noise", warning)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("PAIR",), ("--expert high", "--expert low", "0.875")),
        (("micro", "--expert", "low"), ("micro has one", "--expert low")),
        (("PAIR", "--expert", "high", "--preview-every", 1), ("wanlora sample", "--preview-every")),
    ],
)
def test_a_missing_or_needless_expert_is_refused(held_out_cache, tmp_path, pair, options, named):
    model, *others = (pair if option == "PAIR" else option for option in options)
    message = cli.refuses(
        "train", "--cache", held_out_cache, "--model", model, *others, "--device", "cpu",
        "--output-dir", tmp_path / "run", exit_code=2 if "--preview-every" in options else 1,
    )  # fmt: skip
    assert all(name in message for name in named)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_the_expert_names_its_sub_folder(held_out_cache, tmp_path, pair):
    shutil.copytree(pair / "transformer", tmp_path / "one" / "transformer")
    arguments = ("train", "--cache", held_out_cache, "--model", tmp_path / "one", "--device",
                 "cpu", "--output-dir", tmp_path / "run", "--expert")  # fmt: skip
    assert "missing transformer_2/" in cli.refuses(*arguments, "low")


def test_a_cache_made_with_the_pair_trains_it_by_default_and_encodes_nothing_again(
    held_out_cache, tmp_path, pair
):
    cache = shutil.copytree(held_out_cache, tmp_path / "cache")
    manifest = held_out_cache.parent / "data"
    done = cli.run(
        "cache-latents", "--manifest", manifest, "--cache", cache, "--model", pair, "--device",
        "cpu", "--set", "store.dtype=float32", "--set", "text_dtype=float32", "--view", "pair",
    )  # fmt: skip
    assert "0 encoded" in done.stdout
    assert "--view pair --expert high" in done.stdout  # the next command
    view = read_view(cache, "pair")
    assert (view.model, view.variant) == (str(pair), "micro-a14b")
    message = cli.refuses(
        "train", "--cache", cache, "--view", "pair", "--output-dir", tmp_path / "run"
    )
    assert "--expert high" in message
