"""T2V-14B, and each expert of T2V-A14B, on the meta device: what is counted is what is built."""

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
from wanlora.wan.quantize import quantize_blocks
from wanlora.wan.variants import VARIANTS

SHAPE = VARIANTS["t2v-14b"].shape


def built() -> WanTransformer3DModel:
    """The whole transformer, without an adapter; the numbers are those of the released config."""
    with torch.device("meta"):
        return WanTransformer3DModel(
            num_layers=40, num_attention_heads=40, attention_head_dim=128, ffn_dim=13824,
            text_dim=4096, freq_dim=256, in_channels=16, out_channels=16, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
        ).requires_grad_(False)  # fmt: skip


def test_an_expert_is_such_a_transformer():
    pair = VARIANTS["t2v-a14b"]
    assert len(pair.transformers) == 2
    assert pair.shape == SHAPE


def test_weights_and_linear_modules_are_those_of_the_built_model():
    bare = built()
    kept = WanTransformer3DModel._keep_in_fp32_modules
    narrow, wide = 0, 0
    for name, parameter in bare.named_parameters():
        if set(name.split(".")) & set(kept):
            wide += parameter.numel()
        else:
            narrow += parameter.numel()
    assert narrow + wide == pytest.approx(14.288e9, rel=1e-4)
    assert weight_bytes(SHAPE) == 2 * narrow + 4 * wide
    assert weight_bytes(SHAPE, 4) == 4 * (narrow + wide)
    assert target_names(bare, ".*") == match_targets(linear_names(SHAPE.num_layers), ".*")


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantized_weights_are_those_of_the_quantized_model(kind, dtype):
    model = built()
    for name, parameter in model.named_parameters():
        if not set(name.split(".")) & set(WanTransformer3DModel._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    quantize_blocks(model, kind)
    taken = sum(p.numel() * p.element_size() for p in model.parameters())
    assert weight_bytes(SHAPE, dtype.itemsize, kind) == taken
    assert taken < 0.53 * weight_bytes(SHAPE, dtype.itemsize) or dtype == torch.float32
    adapter = add_adapter(model, LoraShape(2, 2.0, "attention+ffn"), seed=0)
    assert {parameter.dtype for parameter in adapter.values()} == {dtype}


@pytest.mark.parametrize(("preset", "modules"), {"attention": 320, "attention+ffn": 400,
                                                 "all-linear": 405}.items())  # fmt: skip
def test_every_preset_attaches_and_every_name_can_be_exported(preset, modules):
    model = built()
    adapter = add_adapter(model, LoraShape(2, 2.0, preset), seed=0)
    adapted = {name.partition(".lora_")[0] for name in adapter}
    assert len(adapted) == modules
    assert {p for p in PRESETS if preset_of(adapted) == p} == {preset}
    assert adapted == set(match_targets(linear_names(SHAPE.num_layers), preset))
    trained = sum(parameter.numel() for parameter in adapter.values())
    assert trained == num_trained(SHAPE, frozenset(adapted), 2)
    for layout in LAYOUTS.values():
        keys = {module: f"{layout.written(module)}.{layout.matrices['A']}" for module in adapted}
        assert len(set(keys.values())) == modules
        assert {read_key(key).module for key in keys.values()} == adapted
        assert all(read_key(key).module == module for module, key in keys.items())


@pytest.mark.parametrize("preset", PRESETS)
def test_flops_are_those_that_torch_counts(preset, monkeypatch):
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", real_size.fused_attention
    )
    shape, bucket = real_size.shape_of("t2v-14b", num_layers=2), Bucket(81, 480, 832)
    model = real_size.transformer(shape, targets=preset)
    with FlopCounterMode(display=False) as counter:
        real_size.loss(model, real_size.inputs(model, *bucket)).backward()
    adapted = match_targets(linear_names(2), preset)
    counted = step_flops(shape, num_tokens(bucket), rank=32, adapted=adapted)
    assert counter.get_total_flops() == pytest.approx(counted.total, rel=1e-6)
