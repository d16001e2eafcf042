"""`wanlora export` through the command line: other tools get the adapter, or nothing."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

from tests.support import adapters, cli
from tests.support.diffusers_video import plain_diffusers
from tests.support.models import random_tensors, temporary_copy
from wanlora.adapters.file import LoraShape, read_adapter, save_adapter
from wanlora.adapters.header import ADAPTER_FILE
from wanlora.adapters.lora import adapter_parameters, add_adapter, target_names
from wanlora.adapters.names import LAYOUTS
from wanlora.adapters.updates import dense, relative_error
from wanlora.wan.transformer import load_transformer

CPU = torch.device("cpu")
FORMATS = ("diffusers", "peft", "comfyui", "kohya")


def _random(transformer, shape: LoraShape, seed: int = 1, scale: float = 0.1):
    """Values for an adapter of this shape."""
    tensors = {}
    for name in target_names(transformer, shape.targets):
        linear = transformer.get_submodule(name)
        tensors[f"{name}.lora_A.weight"] = torch.empty(shape.rank, linear.in_features)
        tensors[f"{name}.lora_B.weight"] = torch.empty(linear.out_features, shape.rank)
        if shape.dora:
            tensors[f"{name}.lora_magnitude_vector"] = torch.empty(linear.out_features)
    return random_tensors(tensors, seed, scale)


@pytest.fixture(scope="module")
def transformer(micro_folder):
    return load_transformer(micro_folder, dtype=torch.float32, device=CPU)


@pytest.fixture(scope="module")
def run_dir(transformer, tmp_path_factory):
    """A run's folder: latest, best and averaged adapter and two checkpoints, all different."""
    folder, shape = tmp_path_factory.mktemp("runs") / "run", LoraShape(4, 8.0)
    parts = ("", "best", "ema", "checkpoints/step-000010", "checkpoints/step-000020")
    for seed, part in enumerate(parts, start=1):
        facts = {"model": "micro", "step": str(seed)}
        save_adapter(folder / part, _random(transformer, shape, seed), shape, provenance=facts)
    (folder / "config.toml").write_text("")
    return folder


def _export(adapter, form, output, *more):
    name = output if form in ("peft", "merged") else output / "x.safetensors"
    done = cli.invoke(
        "export", "--adapter", adapter, "--format", form, "--output", name, "--json", *more
    )
    assert done.exit_code == 0, done.output
    assert not [path for path in name.parent.iterdir() if path.name.startswith(".")]
    return json.loads(done.stdout)


def _worst(found: Path, expected: Path) -> float:
    ours, theirs = read_adapter(expected).updates(), read_adapter(found).updates()
    assert ours.keys() == theirs.keys()
    return max(relative_error(theirs[module], ours[module]) for module in ours)


# --- adapters ---


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_holds_the_same_update_to_the_last_bit(run_dir, tmp_path, form):
    result = _export(run_dir, form, tmp_path / "out")
    assert (result["max_relative_error"], result["modules"]) == (0.0, 50)
    assert result["read_by"] == ("peft" if form == "peft" else "diffusers")
    assert read_adapter(Path(result["output"])).format == form
    assert _worst(Path(result["output"]), run_dir) == 0.0


@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_diffusers_own_converter_reads_the_update_that_was_trained(run_dir, tmp_path, form):
    file = Path(_export(run_dir, form, tmp_path)["output"])
    theirs = adapters.updates_by_diffusers(file)
    for module, update in read_adapter(run_dir).updates().items():
        torch.testing.assert_close(theirs[module], dense(update))


@pytest.mark.parametrize("form", FORMATS)
def test_the_released_models_300_modules_survive_every_format(tmp_path, form):
    """A scale of 1.5 costs one rounding where a format has to multiply it in."""
    shape = LoraShape(2, 3.0)
    save_adapter(
        tmp_path / "run", _random(adapters.released_transformer(), shape), shape, provenance={}
    )
    result = _export(tmp_path / "run", form, tmp_path / "out")
    assert result["modules"] == 300
    assert result["max_relative_error"] <= (1e-7 if form in ("comfyui", "kohya") else 0.0)


def test_an_export_can_be_exported_back(run_dir, tmp_path):
    path = run_dir
    for number, form in enumerate(("comfyui", "kohya", "peft", "diffusers")):
        path = Path(_export(path, form, tmp_path / str(number))["output"])
    assert _worst(path, run_dir) == 0.0
    assert read_adapter(path).provenance["step"] == "1"


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        (LoraShape(3, 5.0, "all-linear"), "comfyui"),
        (LoraShape(3, 5.0, ["proj_out", "to_q"]), "comfyui"),
        (LoraShape(3, 5.0, rslora=True), "comfyui"),
        (LoraShape(3, 5.0, rslora=True), "kohya"),
        (LoraShape(3, 5.0, rslora=True), "peft"),
        (LoraShape(3, 5.0, dora=True), "diffusers"),
        (LoraShape(3, 5.0, dora=True), "peft"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_scales_and_modules_that_need_care_are_expressed(transformer, tmp_path, shape, form):
    save_adapter(tmp_path / "run", _random(transformer, shape), shape, provenance={})
    output = _export(tmp_path / "run", form, tmp_path / "out")["output"]
    assert _worst(Path(output), tmp_path / "run") < 1e-6


@pytest.mark.parametrize(
    ("shape", "form", "message"),
    [
        (LoraShape(2, 2.0, dora=True), "comfyui", r"DoRA.*norm of W \+ dW.*merged"),
        (LoraShape(2, 2.0, dora=True), "kohya", r"DoRA.*--format merged"),
        (LoraShape(2, 2.0, "attention"), "kohya", "ffn.*--format comfyui.*convert_lora"),
        (
            LoraShape(2, 2.0, "all-linear"),
            "kohya",
            "condition_embedder.*--format comfyui.*convert_lora",
        ),
    ],
)
def test_what_a_format_cannot_say_is_refused_with_the_reason(
    transformer, tmp_path, shape, form, message
):
    save_adapter(tmp_path / "run", _random(transformer, shape), shape, provenance={})
    output = tmp_path / "out" / "x.safetensors"
    said = cli.refuses(
        "export", "--adapter", tmp_path / "run", "--format", form, "--output", output
    )
    assert re.search(message, said)
    assert not output.parent.exists()


def test_a_type_that_spoils_the_adapter_is_refused(transformer, run_dir, tmp_path):
    assert _export(run_dir, "comfyui", tmp_path, "--dtype", "bfloat16")["max_relative_error"] > 1e-3
    shape = LoraShape(2, 2.0)
    tiny = _random(transformer, shape, scale=1e-6)  # below what float16 can hold
    save_adapter(tmp_path / "run", tiny, shape, provenance={})
    said = cli.refuses(
        "export", "--adapter", tmp_path / "run", "--format", "diffusers", "--output",
        tmp_path / "out" / "y.safetensors", "--dtype", "float16",
    )  # fmt: skip
    assert "--dtype float32" in said
    assert not list((tmp_path / "out").iterdir())


def test_an_export_that_reads_back_differently_is_never_there(run_dir, tmp_path, monkeypatch):
    layout = LAYOUTS["comfyui"]
    query, key = "blocks.N.attn1.to_q", "blocks.N.attn1.to_k"
    swapped = {**layout.names, query: layout.names[key], key: layout.names[query]}
    monkeypatch.setitem(LAYOUTS, "comfyui", replace(layout, names=swapped))
    output = tmp_path / "x.safetensors"
    said = cli.refuses(
        "export", "--adapter", run_dir, "--format", "comfyui", "--output", output
    )  # fmt: skip
    assert "was not written" in said
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_diffusers_refuses_is_not_called_read_back(run_dir, tmp_path, monkeypatch):
    """The original Wan code's names after `transformer.`: no module of the model has them."""
    wrong = replace(LAYOUTS["diffusers"], names=LAYOUTS["comfyui"].names)
    monkeypatch.setitem(LAYOUTS, "diffusers", wrong)
    output = tmp_path / "x.safetensors"
    said = cli.refuses("export", "--adapter", run_dir, "--format", "diffusers", "--output", output)
    assert re.search(r"\bdiffusers .*read\b", said)
    assert list(tmp_path.iterdir()) == []


def test_original_names_after_transformer_become_a_file_that_wanpipeline_loads(run_dir, tmp_path):
    theirs = {
        f"transformer.{LAYOUTS['comfyui'].written(module)}".replace("diffusion_model.", ""): update
        for module, update in read_adapter(run_dir).updates().items()
    }
    tensors = {f"{name}.lora_A.weight": update.a for name, update in theirs.items()}
    tensors |= {f"{name}.lora_B.weight": update.b * update.scale for name, update in theirs.items()}
    file = adapters.write(tmp_path / "theirs.safetensors", tensors)
    output = Path(_export(file, "diffusers", tmp_path / "out")["output"])
    found = adapters.updates_by_diffusers(output)
    for module, update in read_adapter(run_dir).updates().items():
        torch.testing.assert_close(found[module], dense(update), rtol=1e-6, atol=1e-6)


def test_a_header_whose_targets_match_more_than_the_matrices_is_converted(run_dir, tmp_path):
    """Only attention has matrices, and the header's target_modules match all linear modules."""
    tensors = {
        f"transformer.{name}": tensor
        for name, tensor in read_adapter(run_dir).tensors.items() if "attn" in name
    }  # fmt: skip
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ".*"}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v
                                                   for k, v in settings.items()})}  # fmt: skip
    file = adapters.write(tmp_path / "theirs.safetensors", tensors, header)
    for form in ("diffusers", "peft"):
        assert _export(file, form, tmp_path / form)["modules"] == 40


def test_an_adapter_of_no_known_model_is_not_exported(tmp_path):
    file = adapters.write(
        tmp_path / "a.safetensors",
        {f"transformer.{n}": t for n, t in adapters.tensors_of(adapters.pairs(
            ["blocks.0.attn1.to_q"])).items()},
    )  # fmt: skip
    said = cli.refuses(
        "export", "--adapter", file, "--format", "diffusers", "--output", tmp_path / "b.safetensors"
    )
    assert "t2v-1.3b 1536" in said


def test_an_adapter_of_the_image_model_can_be_converted(tmp_path):
    names = {"blocks.39.attn2.add_k_proj": (5120, 5120), "blocks.0.attn1.to_q": (5120, 5120),
             "blocks.39.attn2.add_v_proj": (5120, 5120)}  # fmt: skip
    tensors = {f"transformer.{n}.lora_A.weight": torch.randn(1, i) for n, (_, i) in names.items()}
    tensors |= {f"transformer.{n}.lora_B.weight": torch.randn(o, 1) for n, (o, _) in names.items()}
    file = adapters.write(tmp_path / "a.safetensors", tensors)
    assert _export(file, "comfyui", tmp_path / "out")["max_relative_error"] == 0.0


def test_an_equal_adapter_gives_an_equal_file_with_its_history(run_dir, tmp_path):
    first = Path(_export(run_dir, "kohya", tmp_path / "a")["output"])
    assert (
        first.read_bytes() == Path(_export(run_dir, "kohya", tmp_path / "b")["output"]).read_bytes()
    )
    with safetensors.safe_open(first, framework="pt") as file:
        header = file.metadata()
    assert header["modelspec.architecture"] == "wan2.1/lora"
    assert header["modelspec.title"] == "x"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "8")
    assert (header["wanlora.model"], header["wanlora.step"]) == ("micro", "1")
    assert len(header["wanlora.source_sha256"]) == 64


def test_any_adapter_of_a_run_can_be_exported(run_dir, tmp_path):
    wanted = {"latest": ".", "best": "best", "ema": "ema", "10": "checkpoints/step-000010"}
    for name, folder in wanted.items():
        output = _export(run_dir, "comfyui", tmp_path / name, "--checkpoint", name)["output"]
        assert _worst(Path(output), run_dir / folder) == 0.0
    said = cli.refuses(
        "export", "--adapter", run_dir, "--format", "comfyui", "--checkpoint", 30, "--output",
        tmp_path / "x.safetensors",
    )  # fmt: skip
    assert "latest, best, ema, 10, 20" in said


def test_what_is_there_is_not_overwritten(run_dir, tmp_path):
    def refused(output, form="comfyui", *more, code=1):
        return cli.refuses(
            "export", "--adapter", run_dir, "--format", form, "--output", output, *more,
            exit_code=code,
        )  # fmt: skip

    file = tmp_path / "x.safetensors"
    file.write_bytes(b"precious")
    assert "--overwrite" in refused(file, code=2)
    assert file.read_bytes() == b"precious"
    _export(run_dir, "comfyui", tmp_path, "--overwrite")
    assert "adapter itself" in refused(run_dir / ADAPTER_FILE, "diffusers", "--overwrite")
    assert "folder with pytorch_lora_weights" in refused(run_dir / "y.safetensors")
    assert "earlier peft export" in refused(tmp_path, "peft", "--overwrite")
    _export(run_dir, "peft", tmp_path / "peft")
    (tmp_path / ".peft.partial").mkdir()  # left by a kill; nothing hidden remains
    (tmp_path / ".peft.partial" / "adapter_model.safetensors").write_bytes(b"half of it")
    _export(run_dir, "peft", tmp_path / "peft", "--overwrite")
    assert "a name ending in .safetensors" in refused(tmp_path / "folder", code=2)
    assert "needs --format merged" in refused(file, "kohya", "--model", "micro", code=2)


def test_an_adapter_with_nan_is_not_exported(transformer, tmp_path):
    tensors = _random(transformer, LoraShape(2, 2.0))
    next(iter(tensors.values()))[0, 0] = torch.nan
    file = adapters.write(
        tmp_path / "a.safetensors", {f"transformer.{name}": t for name, t in tensors.items()}
    )
    said = cli.refuses(
        "export", "--adapter", file, "--format", "comfyui", "--output", tmp_path / "b.safetensors"
    )
    assert "NaN" in said


# --- merged ---


def test_the_merged_model_makes_the_adapters_video_in_plain_diffusers(
    run_dir, micro_folder, tmp_path
):
    """Within 2 of 255: the sums are the same, in another order."""
    result = _export(run_dir, "merged", tmp_path / "merged", "--dtype", "float32")
    assert (result["model"], result["modules"]) == ("micro", 50)
    assert result["max_relative_error"] < 1e-4
    size = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2,
            "guidance_scale": 1.0}  # fmt: skip

    def video(folder, adapter):
        return plain_diffusers(folder, "a red person", adapter, seed=0, **size).astype(int)

    adapted = video(micro_folder, run_dir)
    assert np.abs(video(tmp_path / "merged", None) - adapted).max() <= 2
    assert np.abs(video(micro_folder, None) - adapted).max() > 20


@pytest.mark.parametrize(
    "shape",
    [LoraShape(4, 6.0, "all-linear"), LoraShape(4, 6.0, rslora=True), LoraShape(4, 6.0, dora=True)],
    ids=["all-linear", "rslora", "dora"],
)
def test_merged_weights_are_what_peft_fuses(micro_folder, tmp_path, shape):
    theirs = load_transformer(micro_folder, dtype=torch.float32, device=CPU)
    parameters = add_adapter(theirs, shape, seed=0)
    values = random_tensors(parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "magnitude" in name:
                values[name] = parameter.detach() * (1 + values[name])
            parameter.copy_(values[name])
    save_adapter(tmp_path / "run", values, shape, provenance={"model": "micro"})
    theirs.fuse_lora()
    _export(tmp_path / "run", "merged", tmp_path / "merged", "--dtype", "float32")
    ours = WanTransformer3DModel.from_pretrained(tmp_path / "merged", subfolder="transformer")
    expected = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in theirs.state_dict().items()
        if ".lora_" not in name
    }
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    assert not adapter_parameters(ours)


def test_the_base_keeps_its_types_and_its_other_files(run_dir, micro_folder, tmp_path):
    """A half-precision base as released: some modules in fp32, weights in shards."""
    base = temporary_copy(micro_folder, tmp_path / "base")
    half = load_transformer(micro_folder, dtype=torch.bfloat16, device=CPU)
    (base / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    half.save_pretrained(base / "transformer", max_shard_size="1MB")
    shards = sorted(path.name for path in (base / "transformer").glob("*.safetensors*"))
    assert len(shards) > 2
    (base / "transformer" / shards[0]).chmod(0o664)
    _export(run_dir, "merged", tmp_path / "merged", "--model", base)
    merged = tmp_path / "merged" / "transformer"
    assert sorted(path.name for path in merged.glob("*.safetensors*")) == shards
    assert (merged / shards[0]).stat().st_mode & 0o777 == 0o664  # as the base's
    for shard in shards[:-1]:
        before, after = (load_file(part / shard) for part in (base / "transformer", merged))
        assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    linked = tmp_path / "merged" / "vae" / "diffusion_pytorch_model.safetensors"
    assert linked.samefile(base / "vae" / "diffusion_pytorch_model.safetensors")
    wide = _export(run_dir, "merged", tmp_path / "fp32", "--model", base, "--dtype", "float32")
    assert wide["max_relative_error"] < 1e-4
    pipeline = WanPipeline.from_pretrained(tmp_path / "fp32", vae=None, text_encoder=None)
    assert pipeline.transformer.dtype == torch.float32


def test_a_base_of_another_size_or_the_base_itself_is_refused(run_dir, micro_folder, tmp_path):
    base = temporary_copy(micro_folder, tmp_path / "base")

    def refused(output, *more):
        return cli.refuses(
            "export", "--adapter", run_dir, "--format", "merged", "--output", output, *more
        )

    assert "earlier merged export" in refused(base, "--model", base, "--overwrite")
    config = base / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 3}))
    assert "num_layers=3" in refused(tmp_path / "merged", "--model", base)
    assert not (tmp_path / "merged").exists()
