"""Spellings of plain LoRA by trainer: each is read as the update that was written."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.support import cli
from tests.support.adapters import ATTENTION, BLOCK_LINEARS, IN, OUT, RANK, original, pairs, write
from tests.support.adapters import modules as block_modules
from wanlora.adapters.file import load_adapter, read_adapter
from wanlora.adapters.header import read_header, read_headers
from wanlora.adapters.updates import dense
from wanlora.errors import AdapterError

SCALE = 0.5
ALPHA = SCALE * RANK
OUTSIDE = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
}
ALL_LINEAR = {module: original(module) for module in block_modules()} | OUTSIDE
AB = ("lora_A.weight", "lora_B.weight")
DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")
DOWN_UP = ("lora_down.weight", "lora_up.weight")


def flat(name: str) -> str:
    return name.replace(".", "_")


def own(name: str) -> str:
    return name


# Trainer: (prefix, original names?, separator, names of A and B, where alpha is, layout).
LAYOUTS = {
    "VideoX-Fun": ("lora_unet__", True, flat, DOWN_UP, "tensor", "kohya"),
    "VideoX-Fun, one underscore": ("lora_unet_", True, flat, DOWN_UP, "tensor", "kohya"),
    "LyCORIS algo=lora": ("lycoris_", False, flat, DOWN_UP, "tensor", "kohya"),
    "LyCORIS algo=lora, original": ("lycoris_", True, flat, DOWN_UP, "tensor", "kohya"),
    "OneTrainer": ("transformer.", False, own, DOWN_UP, "tensor", "diffusers"),
    "OneTrainer, flat": ("lora_transformer_", False, flat, DOWN_UP, "tensor", "kohya"),
    "SimpleTuner's comfyui": ("diffusion_model.", False, own, AB, "tensor", "diffusers"),
    "SimpleTuner's comfyui, down": ("diffusion_model.", False, own, DOWN_UP, "tensor", "diffusers"),
    "ComfyUI": ("diffusion_model.", True, own, AB, "tensor", "comfyui"),
    "whole checkpoints": ("model.diffusion_model.", True, own, AB, "tensor", "comfyui"),
    "peft on the original": ("base_model.model.", True, own, AB, "peft", "peft"),
    "peft on diffusers": ("base_model.model.", False, own, AB, "peft", "peft"),
    "peft without settings": ("base_model.model.", True, own, AB, "tensor", "peft"),
    "peft inside a wrapper": ("base_model.model.transformer.", False, own, AB, "peft", "peft"),
    "transformer, original names": ("transformer.", True, own, AB, "header", "comfyui"),
    "finetrainers": ("transformer.", False, own, AB, "finetrainers", "diffusers"),
    "diffusers": ("transformer.", False, own, AB, "header", "diffusers"),
    "bare diffusers names": ("", False, own, AB, "header", "diffusers"),
    "bare original names": ("", True, own, AB, "tensor", "comfyui"),
    "DiffSynth": ("pipe.dit.", True, own, DEFAULT, "tensor", "comfyui"),
    "old diffusers": ("transformer.", False, own, ("lora.down.weight", "lora.up.weight"), "tensor",
                      "diffusers"),
}  # fmt: skip


# Names of one of a model's two transformers: its expert, beside the fields above.
EXPERTS = {
    "diffusers, transformer_2": (
        "low", ("transformer_2.", False, own, AB, "header", "diffusers")
    ),
    "ai-toolkit, first": ("high", ("diffusion_model.transformer_1.", True, own, AB, "tensor",
                                   "comfyui")),
    "ai-toolkit, second": ("low", ("diffusion_model.transformer_2.", True, own, AB, "tensor",
                                   "comfyui")),
    "OneTrainer, flat": ("low", ("lora_transformer_2_", False, flat, DOWN_UP, "tensor", "kohya")),
    "DiffSynth": ("low", ("pipe.dit2.", True, own, DEFAULT, "tensor", "comfyui")),
    "original, high": ("high", ("high_noise_model.", True, own, DOWN_UP, "tensor", "comfyui")),
    "original, low": ("low", ("low_noise_model.", True, own, DOWN_UP, "tensor", "comfyui")),
}  # fmt: skip


def save(folder, spelling, modules, alpha=ALPHA):
    """Write a file as a trainer does; returns it and each module's update."""
    prefix, is_original, separated, matrices, place, _ = spelling
    tensors, expected = {}, {}
    for module, (a, b) in pairs(modules).items():
        name = prefix + separated(modules[module] if is_original else module)
        tensors |= {f"{name}.{matrices[0]}": a, f"{name}.{matrices[1]}": b}
        if place == "tensor":
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
        expected[module] = alpha / RANK * (b.double() @ a.double())
    settings = {"r": RANK, "lora_alpha": alpha}
    header = {
        "header": {"lora_adapter_metadata": json.dumps(
            {f"transformer.{key}": value for key, value in settings.items()})},
        "finetrainers": {"lora_config": json.dumps(settings)},
    }.get(place)  # fmt: skip
    file = write(folder / "adapter_model.safetensors", tensors, header)
    if place == "peft":
        text = json.dumps({"peft_type": "LORA", **settings})
        (folder / "adapter_config.json").write_text(text)
    return file, expected


A, B = torch.ones(RANK, IN), torch.ones(OUT, RANK)
QUERY = "blocks.0.self_attn.q"
IMAGE = {m: original(m) for m in block_modules(BLOCK_LINEARS)} | {
    "blocks.0.attn2.add_k_proj": "blocks.0.cross_attn.k_img",
    "blocks.0.attn2.add_v_proj": "blocks.0.cross_attn.v_img",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
}
TARGETS = {
    "attention": {m: original(m) for m in block_modules(ATTENTION)},
    "attention+ffn": {m: original(m) for m in block_modules(BLOCK_LINEARS)},
    "all-linear": ALL_LINEAR,
    "image to video": IMAGE,
    "one module of block 11": {"blocks.11.ffn.net.0.proj": "blocks.11.ffn.0"},
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("trainer", LAYOUTS)
def test_each_trainers_spelling_gives_the_update_that_was_written(tmp_path, trainer, targets):
    file, expected = save(tmp_path, LAYOUTS[trainer], TARGETS[targets])
    adapter = read_adapter(file)
    assert (adapter.format, adapter.prefix) == (LAYOUTS[trainer][5], LAYOUTS[trainer][0])
    updates = adapter.updates()
    assert updates.keys() == expected.keys()
    for module, update in updates.items():
        error = (dense(update) - expected[module]).norm() / expected[module].norm()
        assert error <= 1e-6, module


@pytest.mark.parametrize("trainer", LAYOUTS)
def test_inspect_shows_modules_outside_the_blocks_in_every_spelling(tmp_path, trainer):
    file, expected = save(tmp_path, LAYOUTS[trainer], ALL_LINEAR)
    done = cli.invoke("inspect", file, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["modules"] == sorted(expected)
    outside = next(row for row in found["blocks"] if row["block"] == "")
    total = torch.stack([expected[module].norm() for module in OUTSIDE]).norm()
    assert outside["modules"] == len(OUTSIDE)
    assert outside["norm"] == pytest.approx(float(total), rel=1e-6)
    assert "(no block)" in cli.invoke("inspect", file).output


# --- models with two transformers ---


@pytest.mark.parametrize("trainer", EXPERTS)
def test_keys_that_name_one_of_two_transformers_give_its_expert(tmp_path, trainer):
    expert, spelling = EXPERTS[trainer]
    file, expected = save(tmp_path, spelling, TARGETS["attention+ffn"])
    adapter = read_adapter(file)
    assert (adapter.expert, adapter.format) == (expert, spelling[5])
    for module, update in adapter.updates().items():
        torch.testing.assert_close(dense(update), expected[module])


def test_settings_of_the_second_transformer_are_its_adapters(tmp_path):
    file, expected = save(tmp_path, EXPERTS["diffusers, transformer_2"][1], TARGETS["attention"])
    settings = {"transformer.r": RANK, "transformer.lora_alpha": 99,
                "transformer_2.r": RANK, "transformer_2.lora_alpha": ALPHA}  # fmt: skip
    header = {"lora_adapter_metadata": json.dumps(settings)}
    adapter = read_adapter(write(tmp_path / "b.safetensors", load_file(file), header))
    found = dense(adapter.updates()["blocks.1.attn2.to_v"])
    torch.testing.assert_close(found, expected["blocks.1.attn2.to_v"])
    assert not [name for name in adapter.metadata if name.startswith("transformer_2")]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("transformer.", "transformer_2."),
        ("diffusion_model.transformer_1.", "diffusion_model.transformer_2."),
        ("pipe.dit.", "pipe.dit2."),
        ("high_noise_model.", "low_noise_model."),
    ],
)
def test_a_file_for_two_transformers_is_refused_and_read_in_parts(tmp_path, first, second):
    tensors = {}
    for seed, prefix in enumerate((first, second)):
        for module, (a, b) in pairs(block_modules(), seed=seed).items():
            name = f"{prefix}{original(module)}"
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    file = write(tmp_path / "both.safetensors", tensors)
    with pytest.raises(AdapterError) as refused:
        read_adapter(file)
    for fact in ("40 tensors", first, second, f"wanlora export --adapter {file}"):
        assert fact in str(refused.value)
    high, low = read_headers(file)
    assert (high.expert, low.expert) == ("high", "low")
    for seed, part in enumerate((high, low)):
        updates = load_adapter(part).updates()
        for module, (a, b) in pairs(block_modules(), seed=seed).items():
            torch.testing.assert_close(dense(updates[module]), b.double() @ a.double())


@pytest.mark.parametrize(
    ("recorded", "prefix", "facts"),
    [
        ("medium", "transformer.", ["medium", "high or low"]),
        ("high", "transformer_2.", ["high", "low", "transformer_2."]),
    ],
)
def test_an_expert_that_cannot_be_true_is_refused(tmp_path, recorded, prefix, facts):
    tensors = {f"{prefix}{QUERY}.lora_A.weight": A, f"{prefix}{QUERY}.lora_B.weight": B}
    file = write(tmp_path / "a.safetensors", tensors, {"wanlora.expert": recorded})
    with pytest.raises(AdapterError) as refused:
        read_header(file)
    assert all(fact in str(refused.value) for fact in ["wanlora.expert", *facts])


@pytest.mark.parametrize("expert", ["high", "low", None])
def test_the_expert_that_a_run_recorded_is_read(tmp_path, expert):
    tensors = {f"transformer.{QUERY}.lora_A.weight": A, f"transformer.{QUERY}.lora_B.weight": B}
    header = {"wanlora.expert": expert} if expert else {"wanlora.step": "1"}
    file = write(tmp_path / "a.safetensors", tensors, header)
    assert read_header(file).expert == read_adapter(file).expert == expert


# --- alpha ---


def test_an_alpha_in_two_places_that_differ_is_a_warning_with_both(tmp_path, caplog):
    spelling = LAYOUTS["finetrainers"]
    file, expected = save(tmp_path, spelling, TARGETS["attention"])
    tensors = load_file(file)
    header = {
        "lora_config": json.dumps({"r": RANK, "lora_alpha": ALPHA}),
        "lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 8}),
    }
    with caplog.at_level(logging.WARNING):
        adapter = read_adapter(write(tmp_path / "two.safetensors", tensors, header))
    (record,) = caplog.records
    for word in ("lora_config", "lora_adapter_metadata", "8", f"{ALPHA:g}"):
        assert word in record.getMessage()
    update = dense(adapter.updates()["blocks.0.attn1.to_q"])
    torch.testing.assert_close(update, 8 / ALPHA * expected["blocks.0.attn1.to_q"])


@pytest.mark.parametrize(
    ("header", "places"),
    [
        ({"ss_network_alpha": "16"}, [".alpha", "ss_network_alpha"]),
        ({"lora_config": '{"r": 4, "lora_alpha": 16}'}, [".alpha", "lora_config"]),
        ({"ss_network_alpha": "2.0", "lora_config": '{"r": 4, "lora_alpha": 2}'}, []),
        ({"ss_network_alpha": "None"}, []),
    ],
)
def test_alpha_tensors_count_and_a_header_that_differs_is_named(tmp_path, caplog, header, places):
    file, expected = save(tmp_path, LAYOUTS["OneTrainer"], TARGETS["attention"])
    with caplog.at_level(logging.WARNING):
        adapter = read_adapter(write(tmp_path / "b.safetensors", load_file(file), header))
    assert len(caplog.records) == bool(places)
    assert all(place in caplog.text for place in places)
    found = dense(adapter.updates()["blocks.1.attn2.to_v"])
    torch.testing.assert_close(found, expected["blocks.1.attn2.to_v"])


def test_the_alpha_of_a_header_alone_counts_for_nothing_and_is_named(tmp_path, caplog):
    """ComfyUI and diffusers take such a file with scale 1."""
    spelling = ("diffusion_model.", True, own, AB, "none", "")
    file, expected = save(tmp_path, spelling, TARGETS["attention"], alpha=RANK)
    with caplog.at_level(logging.WARNING):
        adapter = read_adapter(
            write(tmp_path / "b.safetensors", load_file(file), {"ss_network_alpha": "1"})
        )
    assert "ss_network_alpha" in caplog.text
    found = dense(adapter.updates()["blocks.1.attn2.to_v"])
    torch.testing.assert_close(found, expected["blocks.1.attn2.to_v"])


# --- refusals ---


@pytest.mark.parametrize(
    ("tensors", "facts"),
    [
        ({f"diffusion_model.{QUERY}.lokr_w1": A}, ["LoKr"]),
        ({"lycoris_blocks_0_attn1_to_q.hada_w1_a": A}, ["LoHa"]),
        ({f"diffusion_model.{QUERY}.dora_scale": A}, ["DoRA"]),
        ({f"diffusion_model.{QUERY}.diff": A}, ["whole weights", f"{QUERY}.diff"]),
        ({f"diffusion_model.{QUERY}.diff_b": A}, ["biases", "lightx2v"]),
        ({"diffusion_model.blocks.0.diff_m": A}, ["modulation", "lightx2v"]),
        ({"diffusion_model.blocks.0.cross_attn.norm_k.diff": A}, ["norms"]),
        ({f"transformer.{QUERY}.lora_B.bias": A}, ["biases"]),
        ({f"diffusion_model.vace_{QUERY}.lora_A.weight": A}, ["vace"]),
        ({f"motion_encoder.{QUERY}.lora_A.weight": A}, ["motion", "encoder"]),
        ({"lora_unet_vace_blocks_0_self_attn_q.lora_down.weight": A}, ["vace"]),
        ({"transformer.blocks.0.attn1.to_qq.lora_A.weight": A}, ["blocks.0.attn1.to_q"]),
        ({"diffusion_model.blocks.7.self_attn.qkv.lora_A.weight": A}, ["blocks.7.self_attn."]),
        ({"lora_unet_blocks_0_fn_0.lora_down.weight": A}, ["blocks.0.ffn.0"]),
        ({"diffusion_model.patch_embedding.lora_A.weight": A}, ["patch_embedding", "linear"]),
        ({"transformer.proj_in.lora_A.weight": A}, ["proj_out"]),
        ({f"transformer.{QUERY}.lora_A.weight": A,
          "transformer.blocks.0.attn1.to_q.lora_A.weight": A}, ["twice"]),
        ({f"transformer.{QUERY}.lora_A.weight": A, f"transformer.{QUERY}.lora_B.weight": B.int()},
         ["int32"]),
        ({f"transformer.{QUERY}.lora_A.weight": A, f"transformer.{QUERY}.lora_B.weight": B,
          f"transformer.{QUERY}.alpha": torch.ones(2)}, [".alpha"]),
    ],
)  # fmt: skip
def test_what_is_not_a_plain_lora_of_wan_is_refused_with_its_reason(tmp_path, tensors, facts):
    with pytest.raises(AdapterError) as refused:
        read_adapter(write(tmp_path / "a.safetensors", tensors))
    assert all(fact in str(refused.value) for fact in facts), refused.value


@pytest.mark.parametrize(
    "header",
    [
        {"lora_config": "[4]"},
        {"lora_adapter_metadata": "{"},
        {"lora_adapter_metadata": '{"transformer.r": 8, "transformer.lora_alpha": 8}'},
        {"lora_adapter_metadata": '{"transformer.r": "x", "transformer.lora_alpha": 8}'},
        {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": null}'},
        {"lora_config": '{"r": 4, "lora_alpha": "many"}'},
    ],
)
def test_a_header_that_does_not_fit_the_tensors_is_refused_by_name(tmp_path, header):
    tensors = {f"transformer.{QUERY}.lora_A.weight": A, f"transformer.{QUERY}.lora_B.weight": B}
    with pytest.raises(AdapterError, match=next(iter(header))):
        read_adapter(write(tmp_path / "a.safetensors", tensors, header))


# --- types ---


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_is_read_inspected_and_exported(tmp_path, dtype):
    modules = SimpleNamespace(a=torch.randn(2, 128).to(dtype), b=torch.randn(128, 2).to(dtype))
    names = ("self_attn.q", "self_attn.k")
    tensors = {
        f"diffusion_model.blocks.0.{name}.lora_{matrix}.weight": getattr(modules, matrix.lower())
        for name in names for matrix in "AB"
    }  # fmt: skip
    file = write(tmp_path / "a.safetensors", tensors)
    found = json.loads(cli.invoke("inspect", file, "--json").stdout)
    assert found["dtypes"] == {str(dtype).removeprefix("torch."): 4}
    expected = modules.b.float() @ modules.a.float()
    assert found["norm"] == pytest.approx(2**0.5 * float(expected.norm()), rel=1e-5)
    output = tmp_path / "out" / "b.safetensors"
    done = cli.invoke("export", "--adapter", file, "--format", "diffusers", "--output", output)
    assert done.exit_code == 0, done.output
    update = read_adapter(output).updates()["blocks.0.attn1.to_k"]
    assert torch.equal(dense(update).float(), expected)
