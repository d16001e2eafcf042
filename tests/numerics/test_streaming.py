"""Streamed blocks compute the same bits as resident ones, while their slots are overwritten.

On a CPU a slot holds NaN from the moment a GPU may overwrite it until the block needs it.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.numerics.test_memory import Operators
from tests.support import real_size
from tests.support.cli import ENVIRONMENT
from tests.support.compiled_blocks import clip, furthest
from tests.support.streamed_blocks import CPU, LAYERS, SHAPE, WAYS, gradients, streamed, tiny
from wanlora.adapters.file import LoraShape
from wanlora.adapters.lora import add_adapter
from wanlora.cost.gpus import GPUS
from wanlora.cost.memory import (
    Workload,
    block_bytes,
    block_linear_bytes,
    host_bytes,
    resident_bytes,
    step_bytes,
)
from wanlora.cost.streaming import predict_streaming
from wanlora.wan import blocks, streaming
from wanlora.wan.base_fingerprint import base_fingerprint
from wanlora.wan.blocks import set_activations
from wanlora.wan.streaming import stream_blocks
from wanlora.wan.transformer import load_transformer


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_streamed", [1, 3, LAYERS])
def test_streaming_changes_no_bit(way, num_streamed):
    """Losses with and without gradients and all gradients, in a first and in later steps."""
    expected = gradients(tiny())
    model = streamed(num_streamed)
    set_activations(model, WAYS[way], compiled=False)
    for _ in range(2):
        assert furthest(gradients(model), expected) == 0


@pytest.mark.parametrize(
    "targets", [r".*attn2\.to_k|.*text_embedder\.linear_1|.*time_proj", r"blocks\.[34]\..*to_q"]
)
def test_neither_do_gradients_that_leave_the_chain_of_blocks(targets):
    """Of the text embedder, through every block; and if the first blocks have no gradient."""
    expected = gradients(tiny(targets))
    model = streamed(LAYERS, targets=targets)
    set_activations(model, WAYS["none"], compiled=False)
    for _ in range(2):
        assert furthest(gradients(model), expected) == 0


@pytest.mark.parametrize("num_streamed", [1, 2, 3, LAYERS])
def test_the_bytes_that_are_copied_are_those_that_were_counted(monkeypatch, num_streamed):
    copied = []
    finish = streaming._CpuCopies.finish

    def counted(copies, slot):
        if slot in copies._started:
            copied.extend(weight.nbytes for weight in copies._started[slot][1].weights)
        finish(copies, slot)

    monkeypatch.setattr(streaming._CpuCopies, "finish", counted)
    model = streamed(num_streamed)
    set_activations(model, WAYS["full"], compiled=False)
    work = Workload(
        SHAPE, 18, 1, 4, frozenset(), compiled=False, element_bytes=4, num_streamed=num_streamed
    )
    expected = predict_streaming(work, WAYS["full"], GPUS["H100"]).copied_bytes
    for step in range(3):
        copied.clear()
        real_size.loss(model, clip(model)).backward()
        first = min(num_streamed, 2) * block_linear_bytes(SHAPE, 4) * (step == 0)
        assert sum(copied) == expected + first
    with torch.no_grad():  # passes that are not followed by a backward pass
        for _ in range(2):
            copied.clear()
            real_size.loss(model, clip(model))
    of_slots = [len(range(slot, num_streamed, 2)) for slot in (0, 1)]
    num_copies = sum(blocks for blocks in of_slots if blocks > 1)
    assert sum(copied) == num_copies * block_linear_bytes(SHAPE, 4)


def test_two_forward_passes_before_their_backward_passes_fetch_what_they_need():
    def both(model):
        losses = [real_size.loss(model, clip(model, num_frames)) for num_frames in (9, 5)]
        sum(losses).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    assert furthest(both(streamed(LAYERS)), both(tiny())) == 0


@pytest.mark.parametrize("way", ["none", "selective", "offload"])
@pytest.mark.parametrize("quantize", ["none", "int8", "fp8"])
def test_bf16_and_8_bit_blocks_stream_too(quantize, way):
    settings = {"dtype": torch.bfloat16, "quantize": quantize}
    expected = gradients(tiny(**settings))
    model = streamed(LAYERS, **settings)
    set_activations(model, WAYS[way], compiled=False)
    for _ in range(2):
        assert furthest(gradients(model), expected) == 0


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_loaded_blocks_are_those_of_the_loaded_model(micro_folder, quantize):
    """Read one tensor at a time; the slots hold the first blocks once they are used."""
    settings = {"dtype": torch.float32, "device": CPU, "quantize": quantize}
    expected = load_transformer(micro_folder, **settings)
    found = load_transformer(micro_folder, **settings, num_streamed=2)
    assert base_fingerprint(found) == base_fingerprint(expected)
    assert all(torch.equal(found.state_dict()[name], tensor)
               for name, tensor in expected.state_dict().items())  # fmt: skip
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in found.parameters())


def test_an_adapter_with_magnitudes_is_added_before_and_computes_the_same():
    """The magnitudes of a DoRA are the norms of the weights, so it needs them in place."""

    def with_dora():
        model = tiny()
        model.unload_lora()
        parameters = add_adapter(model, LoraShape(2, 2.0, "attention+ffn", dora=True), seed=0)
        for name, parameter in parameters.items():
            if "lora_B" in name:
                parameter.data.fill_(0.1)
        return model

    expected, model = gradients(with_dora()), with_dora()
    stream_blocks(model, LAYERS, device=CPU)
    assert furthest(gradients(model), expected) == 0


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("num_streamed", [0, 1, LAYERS])
def test_weights_take_the_memory_that_was_counted_on_the_device_and_the_host(
    num_streamed, quantize
):
    model = tiny(dtype=torch.bfloat16, quantize=quantize)
    stream_blocks(model, num_streamed, device=CPU)
    work = Workload(
        SHAPE, 1, 1, 4, frozenset(), compiled=False, quantize=quantize, num_streamed=num_streamed
    )
    storages = {
        parameter.untyped_storage()._cdata: parameter.untyped_storage().nbytes()
        for name, parameter in model.named_parameters()
        if ".lora_" not in name
    }
    assert sum(storages.values()) == pytest.approx(resident_bytes(work), rel=1e-9)
    rings = {block._wanlora_entry._ring for block in model.blocks if num_streamed == LAYERS}
    sources = [source for ring in rings for source in ring._sources]
    host = sum(weight.nbytes for source in sources for weight in source.weights)
    assert host == (num_streamed == LAYERS) * host_bytes(work)


def test_inputs_in_host_memory_take_the_memory_that_was_counted(monkeypatch):
    """Against full: the difference of the peaks of a step is the difference of the counts."""
    made = []

    class Watched(blocks.SavedInputs):
        def __init__(self, device):
            super().__init__(device)
            made.append(self)

    class Device(Operators):
        """Storages alive except host buffers, which a GPU has in another memory."""

        def note(self, storage):
            buffers = {buffer._bytes.untyped_storage()._cdata for buffer in made[-1]._free}
            self.host = getattr(self, "host", buffers) | buffers
            if storage._cdata not in self.host:
                super().note(storage)

    monkeypatch.setattr(blocks, "SavedInputs", Watched)
    size = (9, 256, 256)
    work = Workload(SHAPE, 3 * 16 * 16, 1, 4, frozenset(), compiled=False, element_bytes=4)
    peaks, counts = [], []
    for mode in ("full", "offload"):
        model = tiny()
        set_activations(model, (mode,) * LAYERS, compiled=False)
        values = real_size.inputs(model, *size)
        real_size.loss(model, values).backward()  # makes the buffers
        with Device() as device:
            real_size.loss(model, values).backward()
        peaks.append(device.peak)
        counts.append(step_bytes(work, (mode,) * LAYERS).total)
    assert len(made[-1]._free) == LAYERS
    # The peak moves to an earlier block, when gradients of the adapter are there.
    gradients_bytes = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert peaks[0] - peaks[1] == pytest.approx(counts[0] - counts[1], abs=gradients_bytes)
    assert counts[0] - counts[1] == 3 * block_bytes(work, "full") > 5 * gradients_bytes


def test_an_adapter_can_be_added_to_streamed_blocks_and_stays_on_the_device():
    model = streamed(LAYERS)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    slots = {
        parameter.data_ptr()
        for name, parameter in model.named_parameters()
        if name.endswith("base_layer.weight")
    }
    assert len(slots) == 2 * 10, "every block has weights of its own on the device"
    assert len(names) == 2 * 10 * LAYERS


def test_a_model_that_was_moved_is_refused_before_it_computes_with_other_weights():
    model = streamed(LAYERS)
    model.to(torch.float64).to(torch.float32)
    with pytest.raises(AssertionError, match="moved"):
        gradients(model)


def compiled(backend, *ways):
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.streamed_blocks", backend, *ways],
        env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def check_compiled(found):
    for result in found.values():
        assert result["differences"] == [0, 0]
        assert len(set(result["graphs"])) == 1, "streamed blocks were compiled again"


def test_streamed_blocks_run_the_compiled_graphs_of_resident_ones(micro_home):
    check_compiled(compiled("aot_eager_decomp_partition", "selective"))


@pytest.mark.slow
def test_so_do_those_of_the_default_compiler(micro_home):
    check_compiled(compiled("inductor", "mixed", "offload", "none+int8"))
