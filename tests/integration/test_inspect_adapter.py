"""`wanlora inspect` on adapters, whoever made them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support import adapters, cli
from tests.support.adapters import ATTENTION, modules, original, pairs, tensors_of, write
from wanlora.adapters.file import LoraShape, save_adapter
from wanlora.adapters.targets import PRESETS, linear_names, match_targets
from wanlora.wan.weights import file_sha256


def _report(path, *, exit_code=0) -> dict:
    done = cli.invoke("inspect", path, "--json")
    assert done.exit_code == exit_code, done.output
    return json.loads(done.stdout)


@pytest.fixture
def run_dir(tmp_path):
    shape = LoraShape(4, 8.0)
    save_adapter(tmp_path / "run", tensors_of(pairs(modules())), shape, provenance={"step": "7"})
    (tmp_path / "run" / "config.toml").write_text("")
    return tmp_path / "run"


def test_a_runs_adapter_is_summed_up(run_dir):
    found = _report(run_dir)
    file = run_dir / "pytorch_lora_weights.safetensors"
    assert (found["format"], found["sha256"]) == ("diffusers", file_sha256(file))
    assert (found["ranks"], found["scales"], found["alpha"]) == ({"4": 20}, {"2.0": 20}, 8.0)
    assert (found["targets"], found["dtypes"]) == ("attention+ffn", {"float32": 40})
    assert found["parameters"] == 20 * 4 * (adapters.IN + adapters.OUT)
    assert found["provenance"] == {"step": "7"}
    assert (found["non_finite"], found["zero"]) == ([], [])


def test_norms_are_those_of_the_updates_multiplied_out(run_dir):
    found = _report(run_dir)
    dense = {name: 2.0 * (b @ a) for name, (a, b) in pairs(modules()).items()}
    total = torch.cat([update.flatten() for update in dense.values()]).norm()
    assert found["norm"] == pytest.approx(float(total), rel=1e-5)
    first = [update for name, update in dense.items() if name.startswith("blocks.0.")]
    assert found["blocks"][0] == {
        "block": "0", "modules": 10,
        "norm": pytest.approx(float(torch.stack([u.norm() for u in first]).norm()), rel=1e-5),
    }  # fmt: skip
    by_kind = {row["kind"]: row["norm"] for row in found["kinds"]}
    both = torch.stack([dense[f"blocks.{n}.ffn.net.2"].norm() for n in (0, 1)]).norm()
    assert by_kind["blocks.N.ffn.net.2"] == pytest.approx(float(both), rel=1e-5)


def test_people_get_tables(run_dir):
    done = cli.invoke("inspect", run_dir)
    text = " ".join(done.output.split())
    for words in (
        "LoRA in the layout of diffusers", "rank 4", "alpha 8", "scale 2",
        "attention+ffn (20 modules)", "attn1.to_out.0 2", "block modules update", "step 7",
    ):  # fmt: skip
        assert words in text, text


def test_another_trainers_file_is_described(tmp_path):
    tensors = {}
    for number, (module, (a, b)) in enumerate(pairs(modules(ATTENTION)).items()):
        name = "lora_unet_" + original(module).replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": a.half(), f"{name}.lora_up.weight": b.half()}
        tensors[f"{name}.alpha"] = torch.tensor(2.0 if number else 1.0)
    header = {"ss_training_comment": "hello", "modelspec.title": "theirs"}
    found = _report(write(tmp_path / "theirs.safetensors", tensors, header))
    assert (found["format"], found["targets"]) == ("kohya", "attention")
    assert found["scales"] == {"1.0": 16}  # folded, for they differ
    assert found["header"] == header
    assert found["provenance"] == {}


@pytest.mark.parametrize(
    ("targets", "shown"),
    [*((name, name) for name in PRESETS), (r"proj_out|.*\.to_q", "proj_out"), (["net.2"], "ffn")],
    ids=str,
)
def test_every_choice_of_targets_is_described(tmp_path, targets, shown):
    names = match_targets(linear_names(2), targets)
    shape = LoraShape(4, 8.0, targets)
    save_adapter(tmp_path, tensors_of(pairs(names)), shape, provenance={})
    found = _report(tmp_path)
    assert found["modules"] == sorted(names)
    assert shown in found["targets"]
    assert sum(row["modules"] for row in found["blocks"]) == len(names)
    assert cli.invoke("inspect", tmp_path).exit_code == 0


def test_an_adapter_of_the_release_before_is_described_and_exported(tmp_path):
    shutil.copytree(Path(__file__).parents[1] / "fixtures/v0.1.0/run", tmp_path / "run")
    found = _report(tmp_path / "run")
    assert found["format"] == "diffusers"
    assert found["provenance"]["wanlora"] == "0.1.0"
    output = tmp_path / "out" / "a.safetensors"
    done = cli.invoke(
        "export", "--adapter", tmp_path / "run", "--format", "comfyui", "--output", output
    )
    assert done.exit_code == 0, done.output
    assert _report(output)["modules"] == found["modules"]


def test_an_adapter_that_changes_nothing_is_noticed(tmp_path):
    tensors = tensors_of(pairs(modules()))
    zero = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()}
    save_adapter(tmp_path / "zero", zero, LoraShape(4, 4.0), provenance={})
    assert "it changes nothing" in cli.invoke("inspect", tmp_path / "zero").output
    zero["blocks.0.attn1.to_q.lora_B.weight"] += 1
    save_adapter(tmp_path / "zero", zero, LoraShape(4, 4.0), provenance={})
    assert "19 modules" in cli.invoke("inspect", tmp_path / "zero").output


def test_numbers_that_are_not_finite_are_named_and_fail(tmp_path):
    tensors = {f"transformer.{n}": t for n, t in tensors_of(pairs(modules())).items()}
    tensors["transformer.blocks.1.ffn.net.2.lora_A.weight"][0, 0] = torch.inf
    file = write(tmp_path / "bad.safetensors", tensors)
    found = _report(file, exit_code=3)
    assert found["non_finite"] == ["blocks.1.ffn.net.2.lora_A.weight"]
    assert found["norm"] is None
    assert found["blocks"][0]["norm"] > 0
    assert "NOT FINITE" in cli.refuses("inspect", file, exit_code=3)


def test_a_path_is_told_to_be_a_cache_or_an_adapter(tmp_path, run_dir):
    assert "leave out --gc" in cli.refuses("inspect", run_dir, "--gc", exit_code=2)
    assert "no adapter at" in cli.refuses("inspect", tmp_path / "missing.safetensors")
    assert "and no adapter" in cli.refuses("inspect", tmp_path / "missing")
    (run_dir / "pytorch_lora_weights.safetensors").unlink()
    assert "saved" in cli.refuses("inspect", run_dir)
