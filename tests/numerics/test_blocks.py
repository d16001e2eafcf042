"""However the blocks run, they compute the same; compiled ones as a few graphs without breaks."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.support.cli import ENVIRONMENT
from tests.support.compiled_blocks import WAYS, furthest, gradients, tiny
from wanlora.wan.attention import pinned, watched
from wanlora.wan.blocks import set_activations


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_changes_no_bit(way, dtype):
    model = tiny(dtype)
    expected = gradients(model)
    set_activations(model, WAYS[way], compiled=False)
    assert furthest(gradients(model), expected) == 0


def measured(way):
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compiled_blocks", way],
        env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("way", ["selective", pytest.param("none", marks=pytest.mark.slow)])
def test_compiled_blocks_share_two_graphs_and_agree_with_eager_ones(micro_home, way):
    """Two whatever the depth: the first block's input needs no gradient."""
    found = measured(way)
    assert found["graphs"] == [2, 2], "a second step compiled again"
    assert found["breaks"] == 0
    assert found["difference"] <= 1e-5
    assert found["attention"] == ["_scaled_dot_product_flash_attention_for_cpu"]


@pytest.mark.slow
def test_a_mixture_and_validation_and_other_sizes_are_compiled_once_each(micro_home):
    found = measured("mixed")
    assert found["graphs"][-1] == found["graphs"][-2]
    assert found["breaks"] == 0
    assert found["difference"] <= 1e-5


def test_the_kernel_that_was_pinned_is_the_one_that_runs():
    model = tiny()
    for kernel, expected in (
        ("auto", "_scaled_dot_product_flash_attention_for_cpu"),
        ("math", "_scaled_dot_product_attention_math"),
    ):
        with pinned(kernel, torch.device("cpu")), watched() as operators:
            gradients(model)
        assert operators == {expected}
