"""Adapters of image-to-video models through the command line: exported, merged, or refused."""

import json

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from safetensors.torch import load_file

from tests.support import adapters, cli
from tests.support.experts import pair_folder
from tests.support.i2v import i2v_folder
from tests.support.models import random_tensors
from wanlora.adapters.file import LoraShape, read_adapter, save_adapter
from wanlora.adapters.lora import target_names
from wanlora.adapters.names import BLOCK_LINEARS
from wanlora.adapters.updates import dense, relative_error

FORMATS = ("diffusers", "peft", "comfyui", "kohya")
WITHOUT_IMAGE = r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))"
"""The modules of a text-to-video block."""


@pytest.fixture(scope="module")
def with_clip(tmp_path_factory):
    """A miniature of Wan2.1's I2V-14B: it reads CLIP embeddings of the image."""
    return i2v_folder(tmp_path_factory.mktemp("models") / "clip", clip=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A miniature of Wan2.2's I2V-A14B."""
    return i2v_folder(tmp_path_factory.mktemp("models") / "pair", clip=False, experts=True)


def _adapter(folder, model_dir, shape=None, *, part="transformer", seed=1, **recorded):
    """Write a random adapter for a model, with what a run records."""
    shape = shape or LoraShape(4, 8.0)
    model = WanTransformer3DModel.from_pretrained(model_dir, subfolder=part)
    tensors = {}
    for name in target_names(model, shape.targets):
        linear = model.get_submodule(name)
        tensors[f"{name}.lora_A.weight"] = torch.empty(shape.rank, linear.in_features)
        tensors[f"{name}.lora_B.weight"] = torch.empty(linear.out_features, shape.rank)
    save_adapter(folder, random_tensors(tensors, seed), shape, provenance=recorded)
    return folder


def _export(*arguments):
    done = cli.invoke("export", *arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


# --- other tools ---


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("targets", "count"), [(WITHOUT_IMAGE, 50), ("attention+ffn", 60)])
def test_every_format_holds_the_update_with_and_without_the_image_modules(
    with_clip, tmp_path, form, targets, count
):
    """Read back by wanlora and by diffusers' own converter, which knows nothing of wanlora."""
    run = _adapter(
        tmp_path / "run", with_clip, LoraShape(4, 8.0, targets), variant="micro-i2v-clip"
    )
    output = tmp_path / "out" if form == "peft" else tmp_path / "out" / "x.safetensors"
    result = _export("--adapter", run, "--format", form, "--output", output)
    assert (result["modules"], result["max_relative_error"]) == (count, 0.0)
    ours, theirs = read_adapter(run).updates(), read_adapter(output).updates()
    assert max(relative_error(theirs[name], update) for name, update in ours.items()) == 0.0
    if form in ("comfyui", "kohya"):
        by_diffusers = adapters.updates_by_diffusers(output)
        assert by_diffusers.keys() == ours.keys()
        for name, update in ours.items():
            torch.testing.assert_close(by_diffusers[name], dense(update))
        names = load_file(output)
        k_img = {"comfyui": "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight",
                 "kohya": "lora_unet_blocks_0_cross_attn_k_img.lora_down.weight"}  # fmt: skip
        assert (k_img[form] in names) is (count == 60)


def test_all_linear_modules_of_an_image_model_survive(with_clip, tmp_path):
    shape = LoraShape(2, 2.0, "all-linear")
    run = _adapter(tmp_path / "run", with_clip, shape, variant="micro-i2v-clip")
    output = tmp_path / "x.safetensors"
    result = _export("--adapter", run, "--format", "comfyui", "--output", output)
    assert (result["modules"], result["max_relative_error"]) == (67, 0.0)
    assert "diffusion_model.img_emb.proj.3.lora_B.weight" in load_file(output)
    report = json.loads(cli.invoke("inspect", output, "--json").stdout)
    assert (report["targets"], report["kind"]) == ("all-linear", "I2V")


def test_half_of_the_image_modules_cannot_have_kohyas_names(with_clip, tmp_path):
    """diffusers reads both of a block or none."""
    half = rf"{WITHOUT_IMAGE}|blocks\.\d+\.attn2\.add_k_proj"
    run = _adapter(tmp_path / "run", with_clip, LoraShape(2, 2.0, half), variant="micro-i2v-clip")
    message = cli.refuses(
        "export", "--adapter", run, "--format", "kohya", "--output", tmp_path / "x.safetensors"
    )
    assert "all 12 linear modules" in message
    assert "blocks.0.attn2.add_v_proj" in message
    assert "--format comfyui" in message


def test_inspect_names_the_kind_of_model(with_clip, tmp_path):
    run = _adapter(tmp_path / "run", with_clip, variant="micro-i2v-clip", model="my/clip")
    shown = cli.invoke("inspect", run)
    assert "image to video (I2V)" in shown.output
    theirs = adapters.write(
        tmp_path / "theirs.safetensors",
        {f"transformer.{name}": tensor for name, tensor in adapters.tensors_of(adapters.pairs(
            adapters.modules(BLOCK_LINEARS))).items()},
    )  # fmt: skip
    assert json.loads(cli.invoke("inspect", theirs, "--json").stdout)["kind"] is None


# --- merged ---


def _weights(folder, part):
    model = WanTransformer3DModel.from_pretrained(folder, subfolder=part)
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def _by_hand(base, run, scale):
    """W + scale B A of each adapted module, from the file of the run."""
    tensors = load_file(run / "pytorch_lora_weights.safetensors")
    expected = dict(base)
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        module = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        b = tensors[f"transformer.{module}.lora_B.weight"].double()
        expected[f"{module}.weight"] = expected[f"{module}.weight"] + scale * b @ tensors[
            key].double()  # fmt: skip
    return expected


def _equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_a_merged_model_is_the_base_with_every_update_and_its_image_encoder(with_clip, tmp_path):
    run = _adapter(
        tmp_path / "run", with_clip, LoraShape(4, 6.0), variant="micro-i2v-clip",
        model=str(with_clip),
    )  # fmt: skip
    merged = tmp_path / "merged"
    _export("--adapter", run, "--format", "merged", "--output", merged, "--dtype", "float32")
    base = _weights(with_clip, "transformer")
    expected = _by_hand(base, run, 6.0 / 4)
    assert not expected["blocks.4.attn2.add_v_proj.weight"].equal(
        base["blocks.4.attn2.add_v_proj.weight"]
    )
    _equal(_weights(merged, "transformer"), expected)
    pipeline = WanImageToVideoPipeline.from_pretrained(merged, vae=None, text_encoder=None)
    assert pipeline.image_encoder is not None
    assert pipeline.image_processor is not None
    file = "image_encoder/model.safetensors"
    assert (merged / file).samefile(with_clip / file)


def test_both_experts_of_a_merged_image_model_have_their_own_updates(pair, tmp_path):
    runs = {
        expert: _adapter(
            tmp_path / expert, pair, part=part, seed=seed, expert=expert,
            variant="micro-i2v-a14b", model=str(pair),
        )
        for seed, (expert, part) in enumerate((("high", "transformer"), ("low", "transformer_2")))
    }  # fmt: skip
    merged = tmp_path / "merged"
    _export(
        "--adapter", runs["low"], "--adapter", runs["high"], "--format", "merged", "--output",
        merged, "--dtype", "float32",
    )  # fmt: skip
    for expert, part in (("high", "transformer"), ("low", "transformer_2")):
        _equal(_weights(merged, part), _by_hand(_weights(pair, part), runs[expert], 2.0))
    index = json.loads((merged / "model_index.json").read_text())
    assert (index["_class_name"], index["boundary_ratio"]) == ("WanImageToVideoPipeline", 0.9)

    both = [f"--adapter={run}" for run in runs.values()]
    steps = [
        cli.invoke("export", *both, "--format", form, "--output", tmp_path / name).stdout
        for form, name in (("comfyui", "a.safetensors"), ("merged", "again"))
    ]
    assert all(f"wan2.2_i2v_{expert}_noise_14B" in steps[0] for expert in runs)
    assert f'WanImageToVideoPipeline.from_pretrained("{tmp_path / "again"}")' in steps[1]


# --- the other kind of model ---


def test_adapters_are_not_merged_into_a_model_of_the_other_kind(with_clip, pair, tmp_path):
    """Their modules have the same shapes, so nothing else would notice."""
    text_pair = pair_folder(tmp_path / "text-pair")
    cases = [
        (_adapter(tmp_path / "t", text_pair, variant="micro", model="micro"), with_clip,
         ("micro (micro)", "micro-i2v-clip")),
        (_adapter(tmp_path / "i", with_clip, variant="micro-i2v-clip", model="my/clip"), "micro",
         ("my/clip (micro-i2v-clip)", "micro (micro)")),
        (_adapter(tmp_path / "p", text_pair, variant="micro-a14b", model="my/pair", expert="low"),
         pair, ("my/pair (micro-a14b)", "micro-i2v-a14b")),
    ]  # fmt: skip
    for run, model, names in cases:
        message = cli.refuses(
            "export", "--adapter", run, "--format", "merged", "--model", model, "--output",
            tmp_path / "merged",
        )  # fmt: skip
        assert {name for name in (*names, str(model)) if name not in message} == set()
    assert not (tmp_path / "merged").exists()


def test_a_file_of_another_tool_is_merged_with_a_line(pair, tmp_path, caplog):
    run = _adapter(tmp_path / "run", pair)
    caplog.set_level("INFO")
    _export(
        "--adapter", run, "--expert", "high", "--format", "merged", "--model", pair, "--output",
        tmp_path / "merged",
    )  # fmt: skip
    (line,) = [message for message in caplog.messages if "does not record" in message]
    assert str(pair) in line
