"""Parts of a pipeline that wait in host memory, and streamed blocks: as few as a GPU requires."""

from pathlib import Path

import pytest
import torch

from wanlora.core.buckets import Bucket
from wanlora.cost.memory import block_linear_bytes, weight_bytes
from wanlora.errors import ConfigError
from wanlora.wan import placement
from wanlora.wan.encoders import load_text_encoder, load_vae
from wanlora.wan.placement import (
    Placement,
    fitting,
    part_bytes,
    select_placement,
    streamed_to_fit,
    working_bytes,
)
from wanlora.wan.transformer import load_transformer
from wanlora.wan.variants import VARIANTS

BF16, GPU = torch.bfloat16, torch.device("cuda")
SHAPE = VARIANTS["t2v-a14b"].shape
SMALL, FULL_SIZE = Bucket(17, 480, 832), Bucket(81, 480, 832)
HOST_BYTES = 512 * 10**9
GB = 1e9
EXPERT = 28.6 * GB  # 14.288 B parameters in bf16
A14B = {"transformer": EXPERT, "transformer_2": EXPERT, "text_encoder": 11.4 * GB, "vae": 0.5 * GB}


@pytest.fixture
def select(monkeypatch):
    """Select a placement of A14B on a card with some free memory, on a machine with much of it."""
    monkeypatch.setattr(placement, "part_bytes", lambda *_, **__: dict(A14B))
    monkeypatch.setattr("wanlora.wan.host_memory.free_host_memory", lambda: HOST_BYTES)

    def selected(free_gb, offload_setting="auto", stream_blocks="auto", size=SMALL):
        free = int(free_gb * GB / placement.USED_SHARE)
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


@pytest.mark.parametrize(
    ("free_gb", "expected"), [(140, "none"), (76, "none"), (75, "model"), (45, "model")]
)
def test_parts_take_turns_on_a_card_that_cannot_hold_all_of_them(free_gb, expected):
    assert fitting(A14B, 6.2 * GB, free_gb * GB) == expected


def test_an_expert_at_480p_needs_what_the_count_of_its_parameters_gives():
    variant = VARIANTS["t2v-a14b"]
    working = working_bytes(variant, Bucket(81, 480, 832), torch.bfloat16)
    assert 4 * GB < working < 8 * GB
    assert working < working_bytes(variant, Bucket(81, 720, 1280), torch.bfloat16)


def test_parts_are_counted_as_they_are_loaded(micro_folder):
    cpu = torch.device("cpu")
    counted = part_bytes(micro_folder, VARIANTS["micro"], device=cpu, dtype=torch.float32)
    loaded = {
        "transformer": load_transformer(micro_folder, dtype=torch.float32, device=cpu),
        "text_encoder": load_text_encoder(micro_folder, dtype=torch.float32, device=cpu).model,
        "vae": load_vae(micro_folder, dtype=torch.float32, device=cpu, tf32=False),
    }
    for name, module in loaded.items():
        assert counted[name] == sum(p.numel() * p.element_size() for p in module.parameters())
