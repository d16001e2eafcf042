"""Streamed blocks: the bits of resident ones, with copies that are slower or faster than blocks."""

import pytest
import torch

from tests.support import streaming_on_a_device
from wanlora.cost.memory import block_linear_bytes
from wanlora.wan.streaming import stream_blocks

STEPS = {"cpu": 2, "cuda": 10}


@pytest.mark.parametrize("length", ["short clips", "long clips"])
def test_streamed_blocks_compute_the_bits_of_resident_ones(device, length):
    """Short clips: blocks wait for copies. Long clips: copies wait for blocks."""
    found = streaming_on_a_device.compare(device, length, STEPS[device.type])
    assert set(found) == {"none", "selective", "full", "offload"}
    assert all(different == [] for different in found.values()), found


@pytest.mark.gpu
def test_so_do_compiled_ones(device, figures_of):
    found = figures_of("streaming_on_a_device")
    assert all(different == [] for different in found.values()), found


@pytest.mark.gpu
def test_host_copies_are_pinned_and_only_two_blocks_are_on_the_device(device):
    model = streaming_on_a_device.model(device)
    shape = streaming_on_a_device.SHAPE
    before = torch.cuda.memory_allocated(device)
    stream_blocks(model, shape.num_layers, device=device)
    saved = (shape.num_layers - 2) * block_linear_bytes(shape)
    found = before - torch.cuda.memory_allocated(device)
    assert found == pytest.approx(saved, rel=0.02)
    entry = model.blocks[0]._wanlora_entry
    assert all(source.weights[0].is_pinned() for source in entry._ring._sources)
