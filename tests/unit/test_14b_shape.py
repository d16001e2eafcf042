"""Wan's models of 14B on the meta device: what is counted is what is built."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from tests.support import real_size
from wanlora.adapters.file import LoraShape
from wanlora.adapters.lora import add_adapter, target_names
from wanlora.adapters.names import LAYOUTS, preset_of, read_key
from wanlora.adapters.targets import PRESETS, linear_names, match_targets
from wanlora.core.buckets import Bucket, num_tokens
from wanlora.cost.flops import step_flops
from wanlora.cost.memory import num_trained, weight_bytes
from wanlora.wan.variants import VARIANTS

SHAPE = VARIANTS["t2v-14b"].shape

CONFIGS = {
    "t2v-14b": {"in_channels": 16},
    "i2v-a14b": {"in_channels": 36},
    "i2v-14b": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
}
"""Differences between the released configurations."""


def built(name: str = "t2v-14b") -> WanTransformer3DModel:
    """The whole transformer, without an adapter; the numbers are those of the released config."""
    with torch.device("meta"):
        return WanTransformer3DModel(
            num_layers=40, num_attention_heads=40, attention_head_dim=128, ffn_dim=13824,
            text_dim=4096, freq_dim=256, out_channels=16, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", **CONFIGS[name],
        ).requires_grad_(False)  # fmt: skip


def test_an_expert_is_such_a_transformer():
    pair = VARIANTS["t2v-a14b"]
    assert len(pair.transformers) == 2
    assert pair.shape == SHAPE


@pytest.mark.parametrize(
    ("name", "billions"), [("t2v-14b", 14.288), ("i2v-a14b", 14.289), ("i2v-14b", 16.395)]
)
def test_weights_and_linear_modules_are_those_of_the_built_model(name, billions):
    bare, shape = built(name), VARIANTS[name].shape
    kept = WanTransformer3DModel._keep_in_fp32_modules
    narrow, wide = 0, 0
    for parameter_name, parameter in bare.named_parameters():
        if set(parameter_name.split(".")) & set(kept):
            wide += parameter.numel()
        else:
            narrow += parameter.numel()
    assert narrow + wide == pytest.approx(1e9 * billions, abs=0.5e6)
    assert weight_bytes(shape) == 2 * narrow + 4 * wide
    assert weight_bytes(shape, 4) == 4 * (narrow + wide)
    linears = linear_names(shape.num_layers, reads_image=shape.image_dim is not None)
    assert target_names(bare, ".*") == match_targets(linears, ".*")


@pytest.mark.parametrize(
    ("variant", "kind", "dtype"),
    [("t2v-14b", "int8", torch.bfloat16), ("i2v-14b", "fp8", torch.bfloat16),
     ("t2v-14b", "fp8", torch.float32)],
)  # fmt: skip
def test_quantized_weights_are_those_of_the_quantized_model(variant, kind, dtype):
    """Two of the forty blocks: all of them have the same shapes."""
    shape = real_size.shape_of(variant, num_layers=2)
    model = real_size.transformer(shape, quantize=kind, dtype=dtype)
    parameters = dict(model.named_parameters())
    frozen = {name: p for name, p in parameters.items() if ".lora_" not in name}
    taken = sum(p.numel() * p.element_size() for p in frozen.values())
    assert weight_bytes(shape, dtype.itemsize, kind) == taken
    adapter = parameters.keys() - frozen.keys()
    assert {parameters[name].dtype for name in adapter} == {dtype}


@pytest.mark.parametrize(
    ("name", "preset", "modules"),
    [
        ("t2v-14b", "attention", 320), ("t2v-14b", "attention+ffn", 400),
        ("t2v-14b", "all-linear", 405), ("i2v-14b", "attention", 400),
        ("i2v-14b", "attention+ffn", 480), ("i2v-14b", "all-linear", 487),
    ],
)  # fmt: skip
def test_every_preset_attaches_and_every_name_can_be_exported(name, preset, modules):
    model, shape = built(name), VARIANTS[name].shape
    adapter = add_adapter(model, LoraShape(2, 2.0, preset), seed=0)
    adapted = {name.partition(".lora_")[0] for name in adapter}
    assert len(adapted) == modules
    assert {p for p in PRESETS if preset_of(adapted) == p} == {preset}
    linears = linear_names(shape.num_layers, reads_image=shape.image_dim is not None)
    assert adapted == set(match_targets(linears, preset))
    trained = sum(parameter.numel() for parameter in adapter.values())
    assert trained == num_trained(shape, frozenset(adapted), 2)
    for layout in LAYOUTS.values():
        keys = {module: f"{layout.written(module)}.{layout.matrices['A']}" for module in adapted}
        assert len(set(keys.values())) == modules
        assert {read_key(key).module for key in keys.values()} == adapted
        assert all(read_key(key).module == module for module, key in keys.items())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_that_torch_counts(name, preset, monkeypatch):
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", real_size.fused_attention
    )
    shape, bucket = real_size.shape_of(name, num_layers=2), Bucket(81, 480, 832)
    model = real_size.transformer(shape, targets=preset)
    with FlopCounterMode(display=False) as counter:
        real_size.loss(model, real_size.inputs(model, *bucket)).backward()
    adapted = match_targets(linear_names(2, reads_image=shape.image_dim is not None), preset)
    counted = step_flops(shape, num_tokens(bucket), rank=32, adapted=adapted)
    assert counter.get_total_flops() == pytest.approx(counted.total, rel=1e-6)
