"""Other tools' adapters, written by hand from their published conventions.

diffusers' converter and peft are the judges of what they mean.
"""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.support import adapters
from tests.support.adapters import ATTENTION, BLOCK_LINEARS, modules, original, pairs, write
from tests.support.models import random_tensors
from wanlora.adapters.file import read_adapter
from wanlora.adapters.names import preset_of
from wanlora.adapters.updates import dense
from wanlora.errors import AdapterError
from wanlora.wan.transformer import load_transformer

CPU = torch.device("cpu")
OUTSIDE = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
}


def comfyui(names=BLOCK_LINEARS, *, words=("lora_A", "lora_B"), alphas=None, ranks=None):
    """Keys of ComfyUI and the original Wan code."""
    tensors = {}
    for number, module in enumerate(modules(names)):
        rank = ranks[number % len(ranks)] if ranks else adapters.RANK
        ((a, b),) = pairs([module], rank, seed=number).values()
        name = f"diffusion_model.{original(module)}"
        tensors |= {f"{name}.{words[0]}.weight": a, f"{name}.{words[1]}.weight": b}
        if alphas:
            tensors[f"{name}.alpha"] = torch.tensor(float(alphas[number % len(alphas)]))
    return tensors


def musubi(names=BLOCK_LINEARS, *, alphas=(1,), dtype=torch.float32):
    """Keys of kohya's trainers."""
    tensors = {}
    for number, (module, (a, b)) in enumerate(pairs(modules(names)).items()):
        name = "lora_unet_" + original(module).replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": a.to(dtype), f"{name}.lora_up.weight": b.to(dtype)}
        tensors[f"{name}.alpha"] = torch.tensor(float(alphas[number % len(alphas)]), dtype=dtype)
    return tensors


def with_outside():
    """Every linear module of Wan, the head too."""
    tensors = comfyui()
    for name, (a, b) in pairs(OUTSIDE.values(), seed=9).items():
        tensors |= {f"diffusion_model.{name}.lora_A.weight": a}
        tensors |= {f"diffusion_model.{name}.lora_B.weight": b}
    return tensors


def diffusers(names=BLOCK_LINEARS):
    return {f"transformer.{k}": t for k, t in adapters.tensors_of(pairs(modules(names))).items()}


WILD = {
    "comfyui": (comfyui(), "comfyui", {1.0}),
    "comfyui, attention": (comfyui(ATTENTION), "comfyui", {1.0}),
    "comfyui, down and up with alpha": (
        comfyui(words=("lora_down", "lora_up"), alphas=[8]), "comfyui", {2.0}
    ),
    "comfyui, alphas differ": (comfyui(alphas=[8, 3]), "comfyui", {1.0}),
    "comfyui, ranks differ": (comfyui(ranks=[4, 2, 4]), "comfyui", {1.0}),
    "comfyui, ranks and alphas differ": (comfyui(ranks=[4, 2], alphas=[8, 3]), "comfyui", {1.0}),
    "comfyui, all linears": (with_outside(), "comfyui", {1.0}),
    "musubi, its default alpha of 1": (musubi(), "kohya", {0.25}),
    "musubi, half precision": (musubi(alphas=[2], dtype=torch.float16), "kohya", {0.5}),
    "musubi, alphas differ": (musubi(alphas=[1, 4, 3]), "kohya", {1.0}),
    "diffusers without metadata": (diffusers(), "diffusers", {1.0}),
}  # fmt: skip


@pytest.mark.parametrize("kind", WILD)
def test_other_tools_files_mean_what_diffusers_reads_in_them(tmp_path, kind):
    tensors, form, scales = WILD[kind]
    file = write(tmp_path / "theirs.safetensors", tensors)
    adapter = read_adapter(file)
    assert adapter.format == form
    assert {"transformer.r", "transformer.lora_alpha"} <= adapter.metadata.keys()
    updates = adapter.updates()
    assert {update.scale for update in updates.values()} == scales
    expected = adapters.updates_by_diffusers(file)
    assert updates.keys() == expected.keys()
    half = tensors[next(iter(tensors))].dtype == torch.float16
    for module, update in updates.items():
        torch.testing.assert_close(
            dense(update), expected[module], rtol=1e-5, atol=5e-3 if half else 1e-5
        )


def test_rank_and_alpha_stay_readable_where_all_modules_share_them(tmp_path):
    """A run that starts from such a file needs the rank and alpha that it was trained with."""
    adapter = read_adapter(write(tmp_path / "a.safetensors", musubi(alphas=[1])))
    assert (adapter.metadata["transformer.r"], adapter.metadata["transformer.lora_alpha"]) == (4, 1)
    raw = pairs(modules())["blocks.1.ffn.net.2"]
    assert torch.equal(adapter.tensors["blocks.1.ffn.net.2.lora_B.weight"], raw[1])


@pytest.mark.parametrize(
    "tensors",
    [
        musubi(ATTENTION, alphas=[2]),
        comfyui(alphas=[2])
        | {
            "diffusion_model.head.head.lora_A.weight": torch.ones(4, 16),
            "diffusion_model.head.head.lora_B.weight": torch.ones(24, 4),
            "diffusion_model.head.head.alpha": torch.tensor(2.0),
        },
    ],
    ids=["kohya, attention only", "comfyui, the head with an alpha"],
)
def test_files_that_diffusers_cannot_read_are_read(tmp_path, tensors):
    file = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises((KeyError, ValueError)):
        adapters.updates_by_diffusers(file)
    updates = read_adapter(file).updates()
    assert {update.scale for update in updates.values()} == {0.5}
    a, b = pairs(modules(ATTENTION))["blocks.0.attn1.to_q"]
    if "proj_out" not in updates:
        expected = 0.5 * (b.double() @ a.double())
        torch.testing.assert_close(dense(updates["blocks.0.attn1.to_q"]), expected)


def test_original_names_without_a_prefix_are_read(tmp_path):
    """As DiffSynth writes them: `blocks.0.self_attn.q.lora_A.default.weight`."""
    plain = {
        key.removeprefix("diffusion_model.").replace(".weight", ".default.weight"): tensor
        for key, tensor in comfyui().items()
    }
    bare = read_adapter(write(tmp_path / "bare.safetensors", plain))
    prefixed = read_adapter(write(tmp_path / "prefixed.safetensors", comfyui()))
    assert bare.format == "comfyui"
    assert bare.tensors.keys() == prefixed.tensors.keys()
    assert all(torch.equal(bare.tensors[name], t) for name, t in prefixed.tensors.items())


PEFT = {
    "plain": {"r": 4, "lora_alpha": 4},
    "alpha": {"r": 4, "lora_alpha": 6},
    "patterns": {
        "r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 2},
        "alpha_pattern": {"blocks.0.attn1.to_k": 3},
    },
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "rslora, ranks differ": {
        "r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"to_v": 3},
    },
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", PEFT)
def test_a_folder_that_peft_saved_gives_the_model_that_peft_had(micro_folder, tmp_path, kind):
    """Through `tensors` and `metadata`, which is how anything here loads it."""
    names = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
    base = load_transformer(micro_folder, dtype=torch.float32, device=CPU)
    before = forward(base)
    theirs = get_peft_model(base, LoraConfig(target_modules=names, **PEFT[kind]))
    trained = {n: p for n, p in theirs.named_parameters() if ".lora_A" in n or ".lora_B" in n}
    with torch.no_grad():
        for name, value in random_tensors(trained).items():
            trained[name].copy_(value)
    theirs.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.format == "peft"
    ours = load_transformer(micro_folder, dtype=torch.float32, device=CPU)
    ours.load_lora_adapter(
        {f"transformer.{name}": tensor for name, tensor in adapter.tensors.items()},
        metadata=adapter.metadata, prefix="transformer", adapter_name="default",
    )  # fmt: skip
    found, expected = forward(ours), forward(theirs.base_model.model)
    assert (expected - before).std() > 0.01 * before.std()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_patterns_of_a_peft_folder_match_the_original_names(tmp_path):
    attention = {
        kind: torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in "qk"})
        for kind in ("self_attn", "cross_attn")
    }
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.ModuleDict(attention)])})
    config = LoraConfig(
        target_modules=["q", "k"], r=4, lora_alpha=4, rank_pattern={"k": 2},
        alpha_pattern={"self_attn.q": 8}, init_lora_weights=False,
    )  # fmt: skip
    theirs = get_peft_model(model, config)
    theirs.save_pretrained(tmp_path)
    updates = read_adapter(tmp_path).updates()
    layers = dict(theirs.base_model.model.named_modules())
    for kind, ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        for name in "qk":
            expected = layers[f"blocks.0.{kind}.{name}"].get_delta_weight("default").double()
            found = dense(updates[f"blocks.0.{ours}.to_{name}"])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def forward(transformer) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, 16, 1, 4, 4, generator=draw),
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=torch.randn(1, 8, 64, generator=draw),
            return_dict=False,
        )[0]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (comfyui() | {"diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(24)},
         r"diff_b.*biases"),
        (musubi() | {"lora_unet_blocks_0_ffn_0.dora_scale": torch.ones(24)}, "dora_scale"),
        ({"lora_unet_blocks_0_ffn_0.lokr_w1": torch.ones(2, 2)}, "lokr_w1"),
        (comfyui() | {"diffusion_model.patch_embedding.lora_A.weight": torch.ones(2, 2)},
         "patch_embedding"),
        (diffusers() | {"transformer_2.blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 2)},
         r"(?s)two transformers.*transformer_2.*wanlora export"),
        ({"diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.ones(2, 2),
          "diffusion_model.blocks.0.ffn.0.lora_B.weight": torch.ones(2, 3)},
         r"ffn\.net\.0\.proj: A is \(2, 2\), B is \(2, 3\)"),
        ({"base_model.model.blocks.0.ffn.net.2.lora_A.weight": torch.ones(2, 2),
          "base_model.model.blocks.0.ffn.net.2.lora_B.weight": torch.ones(2, 2)},
         "adapter_config.json, which is not beside it"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_in_full_is_refused_by_name(tmp_path, tensors, message):
    with pytest.raises(AdapterError, match=message):
        read_adapter(write(tmp_path / "a.safetensors", tensors))


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"peft_type": "LOHA", "r": 4})])
def test_settings_that_are_not_a_loras_are_refused(tmp_path, text):
    key = "base_model.model.blocks.0.ffn.net.2.lora_"
    tensors = {f"{key}A.weight": torch.ones(2, 2), f"{key}B.weight": torch.ones(2, 2)}
    write(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("names", "preset"),
    [
        (modules(ATTENTION), "attention"),
        (modules(), "attention+ffn"),
        (modules() + [name for name in OUTSIDE if name != "proj_out"], "all-linear"),
        (modules()[:-1], None),
        ([*modules(), "proj_out"], None),
        ([name for name in modules(blocks=3) if ".0." not in name[:9]], None),
        ([], None),
    ],
)
def test_targets_are_named_by_their_preset_only_when_it_is_whole(names, preset):
    assert preset_of(names) == preset
