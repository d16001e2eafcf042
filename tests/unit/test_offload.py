"""Which parts of a pipeline wait in main memory."""

from wanlora.core.buckets import Bucket
from wanlora.wan.model_folder import PIPELINE, resolve
from wanlora.wan.offload import fitting, part_bytes, working_bytes
from wanlora.wan.variants import VARIANTS
import torch

GB = 1e9
A14B = {"transformer": 28.6 * GB, "transformer_2": 28.6 * GB, "text_encoder": 11.4 * GB, "vae": 0.5 * GB}


def test_two_experts_take_turns_on_a_card_that_cannot_hold_both():
    assert fitting(A14B, 6.2 * GB, 0.95 * 150 * GB) == "none"  # an H200
    assert fitting(A14B, 6.2 * GB, 0.95 * 80 * GB) == "none"
    assert fitting(A14B, 6.2 * GB, 0.95 * 48 * GB) == "model"
