"""Adapters in the model and in their file, with diffusers' own loader as the judge."""

import json
import shutil
import subprocess
import sys

import pytest
import safetensors
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tests.support.models import random_tensors
from wanlora.adapters.file import LoraShape, read_adapter, save_adapter
from wanlora.adapters.header import ADAPTER_FILE
from wanlora.adapters.lora import (
    adapter_parameters,
    add_adapter,
    check_adapter_fits,
    initial_value,
    target_names,
)
from wanlora.errors import AdapterError, ModelError, NonFiniteError
from wanlora.wan.transformer import load_transformer

CPU = torch.device("cpu")
SHAPE = LoraShape(rank=4, alpha=4.0)


@pytest.fixture
def transformer(micro_folder):
    return load_transformer(micro_folder, dtype=torch.float32, device=CPU)


def forward(transformer, dtype=torch.float32) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, 16, 2, 4, 4, generator=draw).to(dtype),
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=torch.randn(1, 512, 64, generator=draw).to(dtype),
            return_dict=False,
        )[0]


def saved(transformer, folder, shape=SHAPE, **provenance):
    """Fill the adapter with values that matter, and save it."""
    tensors = random_tensors(adapter_parameters(transformer))
    with torch.no_grad():
        for name, parameter in adapter_parameters(transformer).items():
            if "magnitude" in name:  # stay near the norms it starts from
                tensors[name] = parameter.detach() * (1 + tensors[name])
            parameter.copy_(tensors[name])
    save_adapter(folder, tensors, shape, provenance=provenance)
    return tensors


# --- the transformer ---


def test_a_bf16_transformer_keeps_the_fp32_modules_of_diffusers(micro_folder):
    transformer = load_transformer(micro_folder, dtype=torch.bfloat16, device=CPU)
    fp32 = {name for name, p in transformer.named_parameters() if p.dtype == torch.float32}
    assert fp32 == {
        name
        for name, _ in transformer.named_parameters()
        if any(part in name for part in ("time_embedder", "scale_shift_table", ".norm2."))
    }
    assert {buffer.dtype for buffer in transformer.buffers()} == {torch.float32}
    assert transformer.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in transformer.parameters())
    assert not transformer.training


def test_a_folder_with_only_the_transformer_is_enough(micro_folder, tmp_path):
    shutil.copytree(micro_folder / "transformer", tmp_path / "transformer")
    load_transformer(tmp_path, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_that_do_not_fit_the_configuration_are_refused(micro_folder, tmp_path, change):
    shutil.copytree(micro_folder / "transformer", tmp_path / "transformer")
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    if change == "missing":
        del tensors["proj_out.bias"]
    else:
        tensors["proj_in.bias"] = torch.zeros(3)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"1 {change}_keys: proj_(in|out).bias"):
        load_transformer(tmp_path, dtype=torch.float32, device=CPU)


def test_the_output_depends_on_latents_text_and_timestep(transformer):
    latents, text = torch.randn(1, 16, 2, 4, 4), torch.zeros(1, 512, 64)
    text[:, :6] = torch.randn(6, 64)

    def output(latents, time, text):
        with torch.no_grad():
            return transformer(latents, torch.tensor([time]), text, return_dict=False)[0]

    reference = output(latents, 500.0, text)
    assert 0.2 < reference.std() < 2
    for other in (
        output(latents + 0.1, 500.0, text),
        output(latents, 900.0, text),
        output(latents, 500.0, torch.zeros_like(text)),
    ):
        assert (reference - other).std() > 0.02 * reference.std()


def test_training_code_meets_no_encoder(micro_folder):
    code = f"""
import sys, torch
from pathlib import Path
from wanlora.adapters.lora import target_names
from wanlora.wan.transformer import load_transformer
from wanlora.adapters.file import LoraShape, read_adapter, save_adapter
from wanlora.adapters.lora import add_adapter
cpu = torch.device("cpu")
transformer = load_transformer(Path({str(micro_folder)!r}), dtype=torch.float32, device=cpu)
parameters = add_adapter(transformer, LoraShape(rank=2, alpha=2.0), seed=0)
print(*(name for name in (
    "transformers.models.umt5.modeling_umt5",
    "diffusers.models.autoencoders.autoencoder_kl_wan", "diffusers.pipelines",
    "wanlora.wan.encoders", "wanlora.wan.pipeline", "wanlora.micro", "wanlora.media", "av",
) if name in sys.modules))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


# --- targets ---


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("attention", 5 * 8),
        ("attention+ffn", 5 * 10),
        ("all-linear", 5 * 10 + 5),
        (r"blocks\.[01]\.attn1\.to_q", 2),
        (["to_q", "ffn.net.2"], 5 * 3),
        (["blocks.0.attn2.to_k"], 1),
    ],
)
def test_targets_name_linear_modules(transformer, targets, count):
    assert len(target_names(transformer, targets)) == count


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["to_q", "proj_in", "to_key"], "'proj_in', 'to_key'"),  # peft would take to_q alone
        ("to_q", "'to_q'"),  # a regex must match the whole name
        (["patch_embedding"], "'patch_embedding'"),  # a convolution
        ("(", "not a regex"),
        ([], "empty list"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error_that_lists_what_there_is(
    transformer, targets, named
):
    with pytest.raises(AdapterError) as caught:
        target_names(transformer, targets)
    assert named in str(caught.value)
    if named != "not a regex":
        assert "blocks.N.attn1.to_q" in str(caught.value)


@pytest.mark.parametrize(
    ("targets", "num_linears", "millions"), [("attention", 240, 23.6), ("attention+ffn", 300, 43.7)]
)
def test_the_released_model_gets_the_documented_parameters(targets, num_linears, millions):
    with torch.device("meta"):
        transformer = WanTransformer3DModel(
            num_layers=30, num_attention_heads=12, attention_head_dim=128, ffn_dim=8960,
            text_dim=4096,
        )  # fmt: skip
        parameters = add_adapter(transformer, LoraShape(32, 32.0, targets), seed=0)
    assert len(parameters) == 2 * num_linears
    assert round(sum(p.numel() for p in parameters.values()) / 1e6, 1) == millions


# --- initial values ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_step_sees_the_base_model_bit_for_bit(micro_folder, dtype):
    transformer = load_transformer(micro_folder, dtype=dtype, device=CPU)
    base = forward(transformer, dtype)
    parameters = add_adapter(transformer, SHAPE, seed=0)
    assert torch.equal(forward(transformer, dtype), base)
    assert {p.dtype for p in parameters.values()} == {dtype}
    trainable = [name for name, p in transformer.named_parameters() if p.requires_grad]
    assert len(trainable) == len(parameters)
    assert all(".lora_" in name for name in trainable)


def test_initial_values_depend_on_the_seed_and_the_name_alone(micro_folder):
    def start(seed=0, dtype=torch.float32, targets="attention+ffn", draws=0):
        torch.manual_seed(draws)
        transformer = load_transformer(micro_folder, dtype=dtype, device=CPU)
        state = torch.random.get_rng_state()
        parameters = add_adapter(transformer, LoraShape(4, 4.0, targets), seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        return {name: p.detach().float() for name, p in parameters.items()}

    first = start()
    same = start(draws=7, targets="attention")
    assert all(torch.equal(first[name], value) for name, value in same.items())
    rounded = start(dtype=torch.bfloat16)
    assert all(torch.equal(first[n].bfloat16().float(), value) for n, value in rounded.items())
    name = "blocks.0.attn1.to_q.lora_A.weight"
    assert torch.equal(first[name], initial_value(name, (4, 128), 0))
    assert not torch.equal(first[name], start(seed=1)[name])
    assert not torch.equal(first[name], first[name.replace("to_q", "to_k")])


def test_a_starts_with_the_spread_of_pefts_default():
    value = initial_value("blocks.0.attn1.to_q.lora_A.weight", (64, 1536), 0)
    reference = torch.empty(64, 1536)
    torch.nn.init.kaiming_uniform_(reference, a=5**0.5)
    assert value.abs().max() <= 1536**-0.5
    assert value.std() == pytest.approx(float(reference.std()), rel=0.02)
    assert value.mean().abs() < 1e-4


@pytest.mark.parametrize("dora", [False, True])
def test_parameters_are_named_as_pefts_own_export_names_them(transformer, dora):
    shape = LoraShape(4, 4.0, "attention", dora=dora)
    parameters = add_adapter(transformer, shape, seed=0)
    expected = get_peft_model_state_dict(transformer, adapter_name="default")
    assert list(parameters) == sorted(expected)


# --- the file ---


@pytest.mark.parametrize(
    "shape",
    [
        LoraShape(4, 4.0),
        LoraShape(4, 8.0),
        LoraShape(4, 3.5, "attention"),
        LoraShape(4, 8.0, ["to_q", "ffn.net.2"]),
        LoraShape(4, 8.0, "all-linear"),
        LoraShape(4, 8.0, rslora=True),
        LoraShape(4, 8.0, dora=True),
    ],
    ids=["plain", "alpha", "fraction", "list", "all-linear", "rslora", "dora"],
)
def test_diffusers_loads_the_file_to_the_same_output(micro_folder, transformer, tmp_path, shape):
    base = forward(transformer)
    add_adapter(transformer, shape, seed=0)
    saved(transformer, tmp_path, shape)
    trained = forward(transformer)
    assert (trained - base).std() > 0.01 * base.std()
    pipeline = WanPipeline.from_pretrained(micro_folder, vae=None, text_encoder=None)
    pipeline.load_lora_weights(str(tmp_path))
    assert torch.equal(forward(pipeline.transformer), trained)


def test_the_header_holds_the_least_that_a_loader_needs(transformer, tmp_path):
    add_adapter(transformer, LoraShape(4, 8.0), seed=0)
    saved(transformer, tmp_path, LoraShape(4, 8.0), model="micro", step="12")
    with safetensors.safe_open(tmp_path / ADAPTER_FILE, framework="pt") as file:
        header = file.metadata()
    assert header.keys() == {
        "format", "lora_adapter_metadata", "wanlora.model", "wanlora.step",
    }  # fmt: skip
    metadata = json.loads(header["lora_adapter_metadata"])
    assert metadata.keys() == {
        "transformer.r", "transformer.lora_alpha", "transformer.target_modules",
    }  # fmt: skip
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (4, 8)


def test_what_is_saved_is_read_back(transformer, tmp_path):
    add_adapter(transformer, SHAPE, seed=0)
    tensors = saved(transformer, tmp_path, model="micro")
    for path in (tmp_path, tmp_path / ADAPTER_FILE):
        adapter = read_adapter(path)
        assert adapter.tensors.keys() == tensors.keys()
        assert all(torch.equal(adapter.tensors[name], tensors[name]) for name in tensors)
        assert adapter.provenance == {"model": "micro"}
        assert adapter.metadata["transformer.r"] == 4
    assert {tensor.dtype for tensor in adapter.tensors.values()} == {torch.float32}
    assert [path.name for path in tmp_path.iterdir()] == [ADAPTER_FILE]


def test_equal_adapters_are_equal_files(transformer, tmp_path):
    """The library writes header entries in random order; ours are sorted."""
    add_adapter(transformer, SHAPE, seed=0)
    notes = {str(number): "x" for number in range(12)}
    for name in ("a", "b"):
        saved(transformer, tmp_path / name, **notes)
    first, second = ((tmp_path / name / ADAPTER_FILE).read_bytes() for name in ("a", "b"))
    assert first == second


def test_an_adapter_with_nan_is_never_written(transformer, tmp_path):
    parameters = add_adapter(transformer, SHAPE, seed=0)
    tensors = {name: p.detach().clone() for name, p in parameters.items()}
    tensors["blocks.3.attn2.to_v.lora_B.weight"][0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"blocks\.3\.attn2\.to_v\.lora_B"):
        save_adapter(tmp_path, tensors, SHAPE, provenance={})
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_model_is_refused(transformer, tmp_path):
    save_adapter(
        tmp_path,
        {"blocks.0.attn1.to_q.lora_A.weight": torch.zeros(32, 1536),
         "blocks.0.attn1.to_q.lora_B.weight": torch.zeros(1536, 32),
         "blocks.29.attn1.to_q.lora_A.weight": torch.zeros(32, 1536),
             "blocks.29.attn1.to_q.lora_B.weight": torch.zeros(1536, 32)},
        LoraShape(32, 32.0), provenance={},
    )  # fmt: skip
    with pytest.raises(AdapterError, match="another model") as caught:
        check_adapter_fits(read_adapter(tmp_path), transformer)
    assert "expected (32, 128), found (32, 1536)" in str(caught.value)
    assert "no linear module blocks.29.attn1.to_q" in str(caught.value)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_this_model_fits_before_and_after_it_is_loaded(
    micro_folder, transformer, tmp_path, dora
):
    shape = LoraShape(4, 4.0, dora=dora)
    other = load_transformer(micro_folder, dtype=torch.float32, device=CPU)
    add_adapter(transformer, shape, seed=0)
    saved(transformer, tmp_path, shape)
    for model in (other, transformer):
        check_adapter_fits(read_adapter(tmp_path), model)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, f"holds no {ADAPTER_FILE}"),
        ({"a.safetensors": {"x": 1}, "b.safetensors": {"x": 1}}, "a.safetensors, b.safetensors"),
        ({"a.safetensors": {"model.layers.0.q_proj.lora_A.weight": 1}}, "model.layers.0.q_proj"),
        ({"a.safetensors": {"transformer.proj_out.weight": 1}}, "transformer.proj_out.weight"),
        ({"a.safetensors": {"transformer.proj_out.lora_A.weight": 1}}, "proj_out has no lora_B"),
        ({"a.safetensors": None}, "not a safetensors adapter"),
    ],
)  # fmt: skip
def test_what_is_not_an_adapter_is_refused(tmp_path, files, message):
    for name, tensors in files.items():
        if tensors is None:
            (tmp_path / name).write_bytes(b"not a safetensors file")
        else:
            save_file({key: torch.zeros(2, 2) for key in tensors}, tmp_path / name)
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path)


def test_a_missing_adapter_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="no adapter at"):
        read_adapter(tmp_path / "run")
