"""The choice of the attention kernel on a GPU: every kernel's gradients, and the time of each."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.support.planted_kernels import planted
from wanlora.training.kernel_check import AttentionShape
from wanlora.training.kernel_probe import Candidate, choose_kernel, kernel_for
from wanlora.wan import attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CUDA = torch.device("cuda")
# Attention of T2V-1.3B at 81x480x832 and 81x480x480: 120 and 84 mod 128, 512 keys of text.
SHAPE = AttentionShape(
    num_tokens=32_760, other_tokens=frozenset({18_900}), batch_size=1, num_heads=12, head_dim=128,
    num_text_tokens=512, dtype=torch.bfloat16, device=CUDA,
)  # fmt: skip


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(mode=True)
    yield
    torch.use_deterministic_algorithms(mode=False)


def test_the_fastest_fused_kernel_is_chosen_at_the_size_of_the_run():
    choice = kernel_for("auto", SHAPE)
    times = {each.name: each.milliseconds for each in choice.tried if not each.problem}
    print(choice.describe())
    assert len(times) >= 2, choice
    assert "math" not in times
    assert choice.name == min(times, key=times.__getitem__)
    assert not any(each.is_wrong for each in choice.tried), choice
    assert choice.num_tokens == SHAPE.num_tokens


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient", "fa3", "fa4"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_each_kernel_that_runs_here_is_right(kernel, batch_size):
    shape = replace(SHAPE, num_tokens=3960, batch_size=batch_size)
    candidate = Candidate(kernel, partial(attention.pinned, kernel, CUDA))
    flash = Candidate("flash", partial(attention.pinned, "flash", CUDA))
    tried, _ = choose_kernel(shape, [candidate, flash], by_time=True).tried
    assert not tried.is_wrong, tried
    if tried.problem:
        pytest.skip(tried.problem)
    assert tried.milliseconds > 0


def test_a_deterministic_run_gets_a_kernel_that_repeats_itself(deterministic):
    choice = kernel_for("auto", SHAPE, deterministic=True)
    assert choice.name in {"flash", "efficient"}
    assert kernel_for("auto", SHAPE, deterministic=True).name == choice.name


def test_a_kernel_with_a_fault_in_its_last_tile_is_rejected():
    def without_last_tile(query, key, value):
        query[:, :, query.shape[2] // 128 * 128 :] = 0
        return query, key, value

    flash = Candidate("flash", partial(attention.pinned, "flash", CUDA))
    candidates = [planted(without_last_tile), flash]
    choice = choose_kernel(replace(SHAPE, num_tokens=3960), candidates, by_time=True)
    assert choice.name == "flash"
    assert choice.tried[0].is_wrong
