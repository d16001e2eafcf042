"""`wanlora export` and `inspect` for a model with two transformers: each file for the right one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from tests.support import adapters, cli
from tests.support.experts import pair_folder
from tests.support.models import random_tensors
from wanlora.adapters.file import LoraShape, read_adapter, save_adapter
from wanlora.adapters.lora import target_names
from wanlora.adapters.updates import dense, relative_error
from wanlora.wan.transformer import load_transformer

FORMATS = ("diffusers", "peft", "comfyui", "kohya")
EXPERTS = ("high", "low")
PARTS = {"high": "transformer", "low": "transformer_2"}
SHAPE = LoraShape(4, 8.0)
LINEARS = {f"blocks.{n}.attn1.to_q": (128, 128) for n in range(5)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    return pair_folder(tmp_path_factory.mktemp("model") / "pair")


@pytest.fixture(scope="module")
def runs(pair, tmp_path_factory) -> dict[str, Path]:
    """A run of each expert, with random updates."""
    transformer = load_transformer(pair, dtype=torch.float32, device=torch.device("cpu"))
    home = tmp_path_factory.mktemp("runs")
    for seed, expert in enumerate(EXPERTS):
        tensors = {}
        for name in target_names(transformer, SHAPE.targets):
            linear = transformer.get_submodule(name)
            tensors[f"{name}.lora_A.weight"] = torch.empty(4, linear.in_features)
            tensors[f"{name}.lora_B.weight"] = torch.empty(linear.out_features, 4)
        facts = {"model": str(pair), "variant": "micro-a14b", "expert": expert, "step": str(seed)}
        save_adapter(home / expert, random_tensors(tensors, seed + 1), SHAPE, provenance=facts)
        (home / expert / "config.toml").write_text("")
    return {expert: home / expert for expert in EXPERTS}


def _small(path: Path, prefix: str, header: dict[str, str] | None = None, seed: int = 0) -> Path:
    """A LoRA of one kind of module, under another tool's keys."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out, inner) in LINEARS.items():
        name = prefix + adapters.original(module)
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, inner, generator=draw)
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, 2, generator=draw)
    return adapters.write(path, tensors, header)


def _export(*arguments, exit_code=0):
    done = cli.invoke("export", *arguments, "--json")
    assert done.exit_code == exit_code, done.output
    return json.loads(done.stdout)


def _worst(found: Path, expected: Path) -> float:
    ours, theirs = read_adapter(expected).updates(), read_adapter(found).updates()
    assert ours.keys() == theirs.keys()
    return max(relative_error(theirs[module], ours[module]) for module in ours)


# --- two files, one for each loader ---


@pytest.mark.parametrize("form", FORMATS)
def test_a_pair_becomes_two_files_named_and_marked_by_expert(runs, tmp_path, form):
    """The order of --adapter does not matter: the header decides."""
    suffix = "" if form == "peft" else ".safetensors"
    result = _export(
        "--adapter", runs["low"], "--adapter", runs["high"], "--format", form,
        "--output", tmp_path / f"person{suffix}",
    )  # fmt: skip
    assert [each["expert"] for each in result["exports"]] == ["high", "low"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"person_high_noise{suffix}", f"person_low_noise{suffix}"
    ]  # fmt: skip
    for expert, each in zip(EXPERTS, result["exports"], strict=True):
        output = tmp_path / f"person_{expert}_noise{suffix}"
        assert (each["output"], each["max_relative_error"]) == (str(output), 0.0)
        adapter = read_adapter(output)
        assert (adapter.expert, adapter.format) == (expert, form)
        assert not [value for value in adapter.header.values() if str(tmp_path.parent) in value]
        assert _worst(output, runs[expert]) == 0.0


def test_the_file_of_one_expert_is_named_by_it_and_keeps_it_through_every_format(runs, tmp_path):
    path = runs["low"]
    for number, form in enumerate(("comfyui", "kohya", "peft", "diffusers")):
        name = tmp_path / str(number) / ("x" if form == "peft" else "x.safetensors")
        path = Path(_export("--adapter", path, "--format", form, "--output", name)["output"])
        assert path.name.startswith("x_low_noise")
    assert read_adapter(path).expert == "low"
    assert _worst(path, runs["low"]) == 0.0
    named = tmp_path / "y-LowNoise.safetensors"
    assert _export("--adapter", path, "--output", named)["output"] == str(named)


def test_the_lines_name_the_loader_of_each_file(runs, tmp_path):
    both = [f"--adapter={runs[expert]}" for expert in EXPERTS]
    shown = cli.invoke(
        "export", *both, "--format", "comfyui", "--output", tmp_path / "a.safetensors"
    )
    steps = [line for line in shown.stdout.splitlines() if line.startswith("next: ")]
    for expert, step in zip(EXPERTS, steps, strict=True):
        assert f"a_{expert}_noise.safetensors" in step
        assert f"wan2.2_t2v_{expert}_noise_14B" in step
    shown = cli.invoke("export", *both, "--output", tmp_path / "b.safetensors")
    steps = [line for line in shown.stdout.splitlines() if line.startswith("next: ")]
    assert ["load_into_transformer_2=True" in step for step in steps] == [False, True]


def test_the_printed_calls_load_each_file_into_its_transformer(pair, runs, tmp_path):
    both = [f"--adapter={runs[expert]}" for expert in EXPERTS]
    shown = cli.invoke("export", *both, "--output", tmp_path / "a.safetensors")
    pipeline = WanPipeline.from_pretrained(pair, vae=None, text_encoder=None)
    for line in shown.stdout.splitlines():
        if line.startswith("next: "):
            exec(line.removeprefix("next: "), {"pipeline": pipeline})
    for expert, part in PARTS.items():
        layers = dict(getattr(pipeline, part).named_modules())
        for module, update in read_adapter(runs[expert]).updates().items():
            found = layers[module].get_delta_weight(expert)
            torch.testing.assert_close(found.double(), dense(update), rtol=1e-5, atol=1e-7)


# --- files of other tools ---


@pytest.mark.parametrize(
    ("first", "second"),
    [("transformer.", "transformer_2."), ("diffusion_model.transformer_1.",
                                          "diffusion_model.transformer_2.")],
)  # fmt: skip
def test_a_file_for_both_is_split_by_one_export(tmp_path, first, second):
    tensors = {}
    for seed, prefix in enumerate((first, second)):
        tensors |= load_file(_small(tmp_path / "part.safetensors", prefix, seed=seed))
    both = adapters.write(tmp_path / "both.safetensors", tensors)
    assert f"wanlora export --adapter {both}" in cli.refuses("inspect", both)
    output = tmp_path / "out" / "person.safetensors"
    _export("--adapter", both, "--format", "comfyui", "--output", output)
    for seed, expert in enumerate(EXPERTS):
        found = output.with_name(f"person_{expert}_noise.safetensors")
        alone = _small(tmp_path / "alone.safetensors", "diffusion_model.", seed=seed)
        assert read_adapter(found).expert == expert
        assert _worst(found, alone) == 0.0


def test_a_pair_of_ai_toolkit_is_routed_by_its_names(tmp_path):
    files = [
        _small(tmp_path / f"woman_000001500_{expert}_noise.safetensors", "diffusion_model.")
        for expert in ("low", "high")
    ]
    result = _export(
        "--adapter", files[0], "--adapter", files[1], "--output", tmp_path / "out" / "a.safetensors"
    )
    for expert, each in zip(EXPERTS, result["exports"], strict=True):
        assert read_adapter(Path(each["output"])).expert == expert
        assert each["adapter"].endswith(f"_{expert}_noise.safetensors")


@pytest.mark.parametrize(
    ("name", "header", "expert", "place"),
    [
        ("a_high_noise", {}, "high", "name"),
        ("WAN2.2-LowNoise_x", {}, "low", "name"),
        ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise", {}, "high", "name"),
        ("a", {"modelspec.timestep_range": "875,1000"}, "high", "modelspec.timestep_range"),
        ("a", {"modelspec.timestep_range": "0,875"}, "low", "modelspec.timestep_range"),
        ("a_low_noise", {"modelspec.timestep_range": "875,1000"}, None, ""),
        ("a", {"modelspec.timestep_range": "300,1000"}, None, ""),
        ("high_noise_and_low_noise", {}, None, ""),
        ("highway_noise", {}, None, ""),
        ("a_high_noise", {"wanlora.model": "micro"}, None, ""),
        ("a_high_noise", {"wanlora.expert": "low", "wanlora.model": "x"}, "low", "header"),
    ],
)
def test_inspect_shows_the_expert_and_where_it_is_from(tmp_path, name, header, expert, place):
    file = _small(tmp_path / f"{name}.safetensors", "diffusion_model.", header)
    found = json.loads(cli.invoke("inspect", file, "--json").stdout)
    assert (found["expert"], found["expert_from"]) == (expert, place)


def test_inspect_shows_the_range_of_an_expert(runs):
    for expert, sigmas in (("high", [0.875, 1.0]), ("low", [0.0, 0.875])):
        found = json.loads(cli.invoke("inspect", runs[expert], "--json").stdout)
        assert (found["variant"], found["expert"], found["sigmas"]) == (
            "micro-a14b", expert, sigmas
        )  # fmt: skip
        lines = cli.invoke("inspect", runs[expert]).stdout
        assert "micro-a14b" in lines
        assert f"{expert}-noise, sigma {sigmas[0]:g} to {sigmas[1]:g}" in lines


def test_an_expert_can_be_given_for_a_file_that_does_not_show_it(tmp_path):
    file = _small(tmp_path / "epoch-4.safetensors", "pipe.dit.")
    output = tmp_path / "out" / "a.safetensors"
    plain = _export("--adapter", file, "--output", output)
    assert (plain["output"], plain["expert"]) == (str(output), None)
    marked = _export("--adapter", file, "--output", output, "--expert", "low")
    assert read_adapter(Path(marked["output"])).expert == "low"
    with safetensors.safe_open(marked["output"], framework="pt") as opened:
        assert opened.metadata()["wanlora.expert"] == "low"


def test_a_given_expert_that_contradicts_the_name_of_the_file_is_warned_of(tmp_path, caplog):
    file = _small(tmp_path / "theirs_high_noise.safetensors", "pipe.dit.")
    marked = _export("--adapter", file, "--output", tmp_path / "out.safetensors", "--expert", "low")
    assert read_adapter(Path(marked["output"])).expert == "low"
    (warning,) = [each for each in caplog.records if each.levelname == "WARNING"]
    assert str(file) in warning.getMessage()


# --- refusals ---


def test_adapters_that_are_not_one_of_each_expert_are_refused_by_name(runs, tmp_path):
    plain = _small(tmp_path / "plain.safetensors", "diffusion_model.")
    other = tmp_path / "other"
    shutil.copytree(runs["low"], other)
    file = other / "pytorch_lora_weights.safetensors"
    with safetensors.safe_open(file, framework="pt") as opened:
        header = opened.metadata() | {"wanlora.variant": "t2v-a14b"}
    save_file(load_file(file), file, header)

    def refused(*adapter_paths, more=(), code=1):
        given = [f"--adapter={path}" for path in adapter_paths]
        return cli.refuses(
            "export", *given, *more, "--output", tmp_path / "out" / "x.safetensors", exit_code=code
        )

    high, low = runs["high"], runs["low"]
    for message in (refused(high, high), refused(high, plain), refused(plain, plain)):
        assert "high-noise" in message
        assert "low-noise" in message
    assert f"{plain}:" in refused(high, plain)
    assert "micro-a14b, t2v-a14b" in refused(high, other)
    assert "--expert low" in refused(high, more=["--expert", "low"], code=2)
    assert "--expert low" in refused(high, low, more=["--expert", "low"], code=2)
    refused(high, low, low, code=2)
    header = {"wanlora.variant": "t2v-14b", "wanlora.model": "x"}
    one = _small(tmp_path / "one.safetensors", "transformer.", header)
    assert "t2v-14b" in refused(one, more=["--expert", "high"], code=2)
    assert not (tmp_path / "out").exists()


def test_a_name_with_the_other_expert_is_refused(runs, tmp_path):
    for given in ([f"--adapter={runs['high']}"], [f"--adapter={runs[e]}" for e in EXPERTS]):
        message = cli.refuses(
            "export", *given, "--output", tmp_path / "x_low_noise.safetensors", exit_code=2
        )
        assert "low-noise" in message
        assert "high-noise" in message
    assert not list(tmp_path.iterdir())


def test_neither_file_of_a_pair_appears_if_one_cannot_be_written(runs, tmp_path):
    """The values of the second are below what float16 can hold."""
    tiny = tmp_path / "tiny"
    shutil.copytree(runs["low"], tiny)
    file = tiny / "pytorch_lora_weights.safetensors"
    with safetensors.safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    save_file({name: 1e-6 * tensor for name, tensor in load_file(file).items()}, file, header)
    output = tmp_path / "out" / "x.safetensors"
    message = cli.refuses(
        "export", "--adapter", runs["high"], "--adapter", tiny, "--dtype", "float16",
        "--output", output,
    )  # fmt: skip
    assert "--dtype float32" in message
    assert not list(output.parent.iterdir())


# --- merged ---


def _weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return WanTransformer3DModel.from_pretrained(folder, subfolder=part).state_dict()


def test_both_transformers_of_a_merged_model_have_their_own_updates(pair, runs, tmp_path):
    """Against W + (alpha / rank) B A, multiplied out here for each transformer."""
    result = _export(
        "--adapter", runs["high"], "--adapter", runs["low"], "--format", "merged", "--output",
        tmp_path / "merged", "--dtype", "float32",
    )  # fmt: skip
    assert [each["max_relative_error"] < 1e-4 for each in result["exports"]] == [True, True]
    for expert, part in PARTS.items():
        file = load_file(runs[expert] / "pytorch_lora_weights.safetensors")
        expected = {name: tensor.double() for name, tensor in _weights(pair, part).items()}
        for key in file:
            module = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            if key.endswith(".lora_A.weight"):
                b = file[f"transformer.{module}.lora_B.weight"].double()
                expected[f"{module}.weight"] += 8.0 / 4 * b @ file[key].double()
        found = _weights(tmp_path / "merged", part)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-7)


def _frames(pipeline: WanPipeline) -> np.ndarray:
    """Four steps: sigma 1 and 0.9 for the high-noise expert, 0.75 and 0.5 for the other."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a red person", num_frames=5, height=32, width=32, num_inference_steps=4,
        guidance_scale=3.0, generator=torch.Generator().manual_seed(0), output_type="np",
    ).frames[0]  # fmt: skip


def test_the_merged_model_samples_as_the_base_with_both_adapters(pair, runs, tmp_path):
    _export(
        "--adapter", runs["high"], "--adapter", runs["low"], "--format", "merged", "--output",
        tmp_path / "merged", "--dtype", "float32",
    )  # fmt: skip
    adapted = WanPipeline.from_pretrained(pair)
    plain = _frames(adapted)
    name = "pytorch_lora_weights.safetensors"
    adapted.load_lora_weights(runs["high"], weight_name=name, adapter_name="x")
    adapted.load_lora_weights(
        runs["low"], weight_name=name, adapter_name="x", load_into_transformer_2=True
    )
    expected = _frames(adapted)
    found = _frames(WanPipeline.from_pretrained(tmp_path / "merged"))
    assert np.abs(found - expected).max() < 2 / 255
    assert np.abs(found - plain).max() > 20 / 255


@pytest.mark.parametrize("expert", EXPERTS)
def test_one_adapter_is_merged_into_its_transformer_and_the_other_is_the_base_file(
    pair, runs, tmp_path, expert
):
    other = "low" if expert == "high" else "high"
    shown = cli.invoke(
        "export", "--adapter", runs[expert], "--format", "merged", "--output", tmp_path / "merged"
    )
    assert shown.exit_code == 0, shown.output
    assert f"{other}-noise" in shown.stdout
    file = "diffusion_pytorch_model.safetensors"
    kept = tmp_path / "merged" / PARTS[other] / file
    assert kept.samefile(pair / PARTS[other] / file)
    assert not (tmp_path / "merged" / PARTS[expert] / file).samefile(pair / PARTS[expert] / file)
    index = json.loads((tmp_path / "merged" / "model_index.json").read_text())
    assert index["boundary_ratio"] == 0.875
    _export(
        "--adapter", runs[expert], "--format", "merged", "--dtype", "bfloat16", "--overwrite",
        "--output", tmp_path / "merged",
    )  # fmt: skip
    pipeline = WanPipeline.from_pretrained(tmp_path / "merged", vae=None, text_encoder=None)
    assert (pipeline.transformer.dtype, pipeline.transformer_2.dtype) == (torch.float32,) * 2
    for part in PARTS.values():
        tensors = load_file(tmp_path / "merged" / part / file)
        assert tensors["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16


def test_an_adapter_and_a_model_that_do_not_belong_together_are_not_merged(pair, runs, tmp_path):
    plain = _small(tmp_path / "plain.safetensors", "diffusion_model.")
    output = ("--format", "merged", "--output", tmp_path / "merged")
    message = cli.refuses("export", "--adapter", runs["low"], *output, "--model", "micro")
    assert "--model" in message
    message = cli.refuses("export", "--adapter", plain, *output, "--model", pair)
    assert "--expert low" in message
    message = cli.refuses("export", "--adapter", plain, *output, "--expert", "low", exit_code=2)
    assert "--model" in message
    _export("--adapter", plain, *output, "--expert", "low", "--model", pair)
    record = json.loads((tmp_path / "merged" / "wanlora.json").read_text())
    assert (record["model"], record["adapter"]["expert"]) == ("pair", "low")
