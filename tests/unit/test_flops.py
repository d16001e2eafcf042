"""Counted by hand against torch's counter on the real model, on the meta device."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from tests.support import real_size
from tests.support.real_size import fused_attention as fused_attention_op
from tests.support.real_size import shape_of, transformer
from wanlora.adapters.targets import IMAGE_PRESETS, PRESETS
from wanlora.core.buckets import Bucket, num_tokens
from wanlora.cost.flops import TransformerShape, step_flops
from wanlora.wan.variants import VARIANTS

FULL_SIZE = Bucket(81, 480, 832)


def on_meta(shape: TransformerShape, targets: str, rank: int) -> WanTransformer3DModel:
    return transformer(shape, targets=targets, rank=rank, dtype=torch.float32)


def adapted_by(model: WanTransformer3DModel, targets: str) -> set[str]:
    return {name for name, _ in model.named_modules() if re.fullmatch(targets, name)}


@pytest.fixture
def fused_attention(monkeypatch):
    """On the meta device torch chooses the unfused kernel; a GPU runs this one or its like."""

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused_attention_op)


def counted(model: WanTransformer3DModel, bucket: Bucket) -> tuple[float, float]:
    """FLOPs of forward, and of forward and backward, by torch's counter."""
    values = {name: value.float() for name, value in real_size.inputs(model, *bucket).items()}
    with FlopCounterMode(display=False) as counter:
        output = model(**values, return_dict=False)[0]
        forward = counter.get_total_flops()
        output.sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize(
    "targets",
    [
        *PRESETS.values(),
        r"blocks\.1\.attn2\.to_q",  # nothing before it needs a gradient
        r"blocks\.0\.attn2\.to_k|blocks\.1\.ffn\.net\.2",
        r"condition_embedder\.text_embedder\.linear_2",
    ],
)
def test_every_choice_of_targets_is_counted_exactly(fused_attention, targets):
    shape, bucket = shape_of("t2v-1.3b", num_layers=2), Bucket(17, 64, 96)
    model = on_meta(shape, targets, rank=8)
    adapted = adapted_by(model, targets)
    flops = step_flops(shape, num_tokens(bucket), rank=8, adapted=adapted)
    assert (flops.forward.total, flops.model) == counted(model, bucket)
    assert flops.recompute == 0


@pytest.mark.parametrize(
    "targets",
    [
        *IMAGE_PRESETS.values(),
        r"blocks\.1\.attn2\.add_k_proj",  # the keys of the text need no gradient
        r"blocks\.0\.attn2\.add_v_proj|blocks\.1\.ffn\.net\.2",
        r"condition_embedder\.image_embedder\.ff\.net\.2",
    ],
)
def test_every_choice_of_targets_of_a_model_that_reads_an_image_is_counted_exactly(
    fused_attention, targets
):
    whole, bucket = VARIANTS["micro-i2v-clip"].shape, Bucket(17, 64, 96)
    shape = replace(whole, num_layers=2)
    model = on_meta(shape, targets, rank=8)
    adapted = adapted_by(model, targets)
    flops = step_flops(shape, num_tokens(bucket), rank=8, adapted=adapted)
    assert (flops.forward.total, flops.model) == counted(model, bucket)


def test_checkpointing_counts_the_blocks_twice(fused_attention):
    shape, bucket = shape_of("t2v-1.3b", num_layers=2), Bucket(17, 64, 96)
    model = on_meta(shape, PRESETS["attention+ffn"], rank=8)
    adapted = adapted_by(model, PRESETS["attention+ffn"])
    model.enable_gradient_checkpointing(
        partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    )
    flops = step_flops(shape, num_tokens(bucket), rank=8, adapted=adapted, recompute="full")
    assert flops.total == counted(model.train(), bucket)[1]
    assert 0 < flops.recompute < flops.forward.total  # the embedders run once


def test_the_real_model_at_full_size(fused_attention):
    """870.2 TF, as docs and benchmarks say; torch's counter agrees."""
    shape = shape_of("t2v-1.3b")
    tokens = num_tokens(FULL_SIZE)
    assert tokens == 32_760
    model = on_meta(shape, PRESETS["attention"], rank=32)
    names = adapted_by(model, PRESETS["attention"])
    flops = step_flops(shape, tokens, rank=32, adapted=names)
    assert flops.model == pytest.approx(counted(model, FULL_SIZE)[1], rel=1e-6)
    assert flops.model == pytest.approx(870.2e12, rel=1e-3)
    assert flops.forward.self_attention == pytest.approx(197.8e12, rel=1e-3)
    assert flops.backward.frozen_linears == pytest.approx(81.5e12, rel=1e-3)
    full = step_flops(shape, tokens, rank=32, adapted=names, recompute="full")
    assert full.total == pytest.approx(1154.4e12, rel=1e-3)
    with_ffn = [
        *names,
        *(f"blocks.{i}.ffn.net.{part}" for i in range(30) for part in ("0.proj", "2")),
    ]
    both = step_flops(shape, tokens, rank=32, adapted=with_ffn)
    assert both.model == pytest.approx(874.2e12, rel=1e-3)
