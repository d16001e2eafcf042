"""Streamed blocks of videos: as few as the memory of a GPU requires."""

from pathlib import Path

import pytest
import torch

from tests.unit.test_offload import A14B, EXPERT, GB
from wanlora.core.buckets import Bucket
from wanlora.cost.memory import block_linear_bytes, weight_bytes
from wanlora.errors import ConfigError
from wanlora.wan import offload, placement
from wanlora.wan.placement import Placement, select_placement, streamed_to_fit
from wanlora.wan.variants import VARIANTS

BF16, GPU = torch.bfloat16, torch.device("cuda")
SHAPE = VARIANTS["t2v-a14b"].shape
SMALL, FULL_SIZE = Bucket(17, 480, 832), Bucket(81, 480, 832)
HOST_BYTES = 512 * 10**9


@pytest.fixture
def select(monkeypatch):
    """Select a placement of A14B on a card with some free memory, on a machine with much of it."""
    for module in (offload, placement):
        monkeypatch.setattr(module, "part_bytes", lambda *_, **__: dict(A14B))
    monkeypatch.setattr("wanlora.wan.host_memory.free_host_memory", lambda: HOST_BYTES)

    def selected(free_gb, offload_setting="auto", stream_blocks="auto", size=SMALL):
        free = int(free_gb * GB / offload.USED_SHARE)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, free))
        return select_placement(
            offload_setting, stream_blocks, Path(), VARIANTS["t2v-a14b"], size, device=GPU,
            dtype=BF16,
        )  # fmt: skip

    return selected


@pytest.mark.parametrize("free_gb", [3, 5, 12, 28, 30])
def test_the_fewest_blocks_are_streamed_with_which_the_weights_fit(free_gb):
    def resident(num_streamed):
        away = max(0, num_streamed - 2)
        return weight_bytes(SHAPE) - away * block_linear_bytes(SHAPE)

    found = streamed_to_fit(SHAPE, BF16, free_gb * GB)
    assert resident(found) <= free_gb * GB
    assert found == 0 or resident(found - 1) > free_gb * GB
    assert streamed_to_fit(SHAPE, BF16, 0) == 40, "all of them, if nothing fits"


def test_nothing_is_streamed_if_one_part_at_a_time_fits(select):
    assert select(80) == Placement("none", 0)
    assert select(40) == Placement("model", 0)
    assert select(24, stream_blocks=0) == Placement("model", 0)


@pytest.mark.parametrize("free_gb", [16, 20, 24])
def test_both_experts_stay_on_a_small_card_beside_one_other_part(select, free_gb):
    found = select(free_gb)
    assert found.offload == "model"
    resident = EXPERT - (found.num_streamed - 2) * block_linear_bytes(SHAPE)
    assert 2 * resident + A14B["text_encoder"] <= 1.001 * free_gb * GB
    assert 30 < found.num_streamed <= 40


def test_a_number_is_used_and_the_other_parts_fit_around_it(select):
    assert select(23, stream_blocks=40) == Placement("none", 40)
    assert select(14, stream_blocks=40) == Placement("model", 40)
    assert select(14, "none", 30) == Placement("none", 30)


def test_two_ways_of_moving_layers_are_refused_together(select):
    with pytest.raises(ConfigError, match="sequential"):
        select(24, "sequential", 3)
    with pytest.raises(ConfigError, match="--stream-blocks 40"):
        select(24, "none", 41)
