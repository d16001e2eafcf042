"""Which parts of a pipeline wait in main memory."""

import pytest
import torch

from wanlora.core.buckets import Bucket
from wanlora.wan.encoders import load_text_encoder, load_vae
from wanlora.wan.offload import fitting, part_bytes, working_bytes
from wanlora.wan.transformer import load_transformer
from wanlora.wan.variants import VARIANTS

GB = 1e9
EXPERT = 28.6 * GB  # 14.288 B parameters in bf16
A14B = {"transformer": EXPERT, "transformer_2": EXPERT, "text_encoder": 11.4 * GB, "vae": 0.5 * GB}


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
