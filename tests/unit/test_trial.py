"""The trial of the largest bucket: what it checks, holds and logs."""

import logging
import re
import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from tests.support import real_size
from wanlora import progress
from wanlora.commands.train.step_errors import suspect_kernel
from wanlora.core.buckets import Bucket
from wanlora.cost.flops import TransformerShape
from wanlora.errors import ConfigError, DeviceError, NonFiniteError
from wanlora.training import fitting, trial
from wanlora.training.trial import random_batch
from wanlora.training.workload import Trial, workload
from wanlora.wan import attention
from wanlora.wan import device as devices
from wanlora.wan.variants import VARIANTS

CPU, BUCKET = torch.device("cpu"), Bucket(5, 16, 16)
SHAPE = TransformerShape(
    num_layers=2, num_attention_heads=2, attention_head_dim=16, ffn_dim=64, text_dim=32
)


@pytest.fixture
def model():
    transformer = real_size.transformer(SHAPE, rank=2, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in factors(transformer, "B"):
            parameter.zero_()  # as in a fresh adapter
    return transformer


VARIANT = replace(VARIANTS["micro"], shape=SHAPE)


def work_of():
    return workload(
        VARIANT, BUCKET, batch_size=1, rank=2, adapted=["blocks.0.attn1.to_q"], compiled=False,
        element_bytes=4,
    )  # fmt: skip


def fit(model):
    return fitting.fit(
        model, work_of(), BUCKET, VARIANT, activations="none", kernel="auto", device=CPU,
        dtype=torch.float32,
    )  # fmt: skip


def factors(model, part):
    return [p for name, p in model.named_parameters() if f".lora_{part}." in name]


def test_a_gradient_that_is_not_finite_is_refused_with_another_kernel(model, caplog):
    caplog.set_level(logging.INFO)
    model.blocks[1].attn1.register_full_backward_hook(
        lambda _module, given, _output: tuple(g if g is None else g * torch.nan for g in given)
    )
    with pytest.raises(NonFiniteError) as refused:
        fit(model)
    message = str(refused.value)
    assert "lora_A" in message
    assert "--set attention=math" in message
    assert re.search(r"Attention ran by _scaled_dot_product", message)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.any() for parameter in factors(model, "B"))


def test_what_is_tried_is_logged_before_it_is_tried(model, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    lines: list[str] = []
    monkeypatch.setattr(trial, "_try", lambda *_: lines.extend(caplog.messages) or SMALL)
    fit(model)
    assert any("5x16x16" in line and "batch_size 1" in line for line in lines)
    assert any("activations none" in line for line in lines)


def test_the_limit_of_a_trial_is_that_of_its_plan(model, caplog, monkeypatch):
    """On a CPU the memory that the trial takes would raise it."""
    caplog.set_level(logging.INFO)
    limits = iter([3e9, 5e9])
    monkeypatch.setattr(fitting, "budget", lambda *_, **__: next(limits))
    found = fit(model)
    assert found.limit_bytes == 3e9
    fitting.log_trial(found, work_of())
    assert "of 3 GB" in caplog.messages[-1]


SMALL = Trial(("none",) * 2, seconds=1.0, peak_bytes=None, attention=())


def test_a_fresh_adapter_is_tried_with_values_in_b_and_gets_its_own_back(model):
    first, *others = factors(model, "B")
    with torch.no_grad():
        first.fill_(3.0)
    with trial._nonzero_factors(model):
        for parameter in (first, *others):
            assert 0 < parameter.abs().max() <= trial.FACTOR_MAX
    assert not any(parameter.any() for parameter in others)
    assert (first == 3.0).all()
    seen = []
    for parameter in factors(model, "A"):
        parameter.register_hook(lambda gradient: seen.append(bool(gradient.any())))
    assert fit(model).non_finite == ()
    assert seen
    assert all(seen)


def test_a_random_batch_has_values_like_a_real_one():
    batch = random_batch(BUCKET, 1, num_channels=16, text_shape=(512, 64))
    for tensor in (batch.latents, batch.noise):
        assert 0.8 < tensor.std() < 1.2
    assert not torch.equal(batch.latents, batch.noise)
    used = batch.prompt_embeds[0].any(dim=1)
    assert 0 < used.sum() < 512
    again = random_batch(BUCKET, 1, num_channels=16, text_shape=(512, 64))
    assert torch.equal(batch.latents, again.latents)


@pytest.mark.parametrize(
    ("kernel", "suggested"), [("auto", "flash"), ("cudnn", "flash"), ("flash", "efficient")]
)
def test_a_nan_on_a_gpu_names_the_kernel_that_ran(kernel, suggested, tmp_path):
    text = suspect_kernel(tmp_path, kernel, ["_cudnn_attention"], torch.device("cuda"))
    assert "_cudnn_attention" in text
    assert f"--set attention={suggested}" in text
    assert not suspect_kernel(tmp_path, "auto", ["_cudnn_attention"], CPU)


def test_a_backend_of_diffusers_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "_native_flash")
    with (
        pytest.raises(ConfigError, match=r"DIFFUSERS_ATTN_BACKEND=_native_flash.*unset it"),
        attention.pinned("auto", CPU),
    ):
        raise AssertionError
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "native")
    with attention.pinned("auto", CPU):
        pass


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
    ],
)
def test_segments_of_the_allocator_grow_unless_the_user_configured_it(
    before, expected, monkeypatch
):
    environment = dict(before)
    monkeypatch.setattr(devices.os, "environ", environment)
    monkeypatch.setattr(devices.sys, "platform", "linux")
    devices.use_expandable_segments()
    assert environment.get("PYTORCH_ALLOC_CONF") == expected


def test_deterministic_includes_the_compiler(monkeypatch):
    from torch._inductor import config as inductor

    if not hasattr(inductor, "deterministic"):
        pytest.skip("torch 2.9 has no such mode")
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: None)
    monkeypatch.setattr(inductor, "deterministic", False)
    devices.use_deterministic_algorithms(compiled=True)
    assert inductor.deterministic


def test_a_compiler_without_a_deterministic_mode_is_refused_and_eager_blocks_are_not(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *, mode: asked.append(mode))
    monkeypatch.setitem(sys.modules, "torch._inductor.config", ModuleType("config"))
    monkeypatch.setattr(torch._inductor, "config", ModuleType("config"), raising=False)
    with pytest.raises(DeviceError, match=r"--eager.*pip install"):
        devices.use_deterministic_algorithms(compiled=True)
    assert asked == []
    devices.use_deterministic_algorithms(compiled=False)
    assert asked == [True]


def test_a_long_call_is_announced_and_reminded_of(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.02)
    with progress.waiting("loading it"):
        assert caplog.messages[0] == "loading it"
        while len(caplog.messages) < 3:
            pass
    assert "loading it" in caplog.messages[2]
    with progress.waiting("unseen", shown=False):
        pass
    assert "unseen" not in caplog.text


TRIAL = """
import gc
from dataclasses import replace
import torch
from tests.support import real_size
from wanlora.core.buckets import Bucket
from wanlora.training import fitting
from wanlora.training.workload import workload
from wanlora.wan.host_memory import own_bytes
from wanlora.wan.variants import VARIANTS

row = VARIANTS["t2v-1.3b"]
row, size = replace(row, shape=replace(row.shape, num_layers=2)), Bucket(5, 128, 224)
model = real_size.transformer(row.shape, rank=32, device="cpu", dtype=torch.float32)
adapted = [f"blocks.{n}.attn{a}.to_{part}" for n in (0, 1) for a in (1, 2) for part in "qkv"]
work = workload(row, size, batch_size=1, rank=32, adapted=adapted, compiled=False, element_bytes=4)
before = own_bytes()
fitting.fit(
    model, work, size, row, activations="none", kernel="auto", device=torch.device("cpu"),
    dtype=torch.float32, passes=2,
)
gc.collect()
print(own_bytes() - before)
"""


def test_activations_of_a_trial_on_a_cpu_go_back_to_the_system():
    """Two blocks of the real size. In a process of its own, whose heap no other test has used."""
    done = subprocess.run([sys.executable, "-c", TRIAL], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 80e6  # by default 260 MB stay
