"""What is planned fits, and nothing faster would have."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanlora.adapters.targets import linear_names, match_targets
from wanlora.core.buckets import Bucket, num_tokens
from wanlora.cost.gpus import GPUS
from wanlora.cost.memory import Workload, longest_clip, num_trained, plan, step_bytes, weight_bytes
from wanlora.cost.seconds import model_flops
from wanlora.training.workload import budget_of_gpu
from wanlora.wan.variants import VARIANTS

FULL_SIZE = Bucket(81, 480, 832)


def work_of(targets: str = "attention", variant: str = "t2v-1.3b", **changes) -> Workload:
    row = VARIANTS[variant]
    work = Workload(
        shape=row.shape,
        num_tokens=num_tokens(FULL_SIZE),
        batch_size=1,
        rank=32,
        adapted=frozenset(match_targets(linear_names(row.shape.num_layers), targets)),
        compiled=True,
    )
    return replace(work, **changes)


def test_parameters_are_those_of_the_recipe():
    assert num_trained(work_of().shape, work_of().adapted, 32) == pytest.approx(23.6e6, rel=2e-3)
    both = work_of("attention+ffn")
    assert num_trained(both.shape, both.adapted, 32) == pytest.approx(43.7e6, rel=2e-3)
    assert weight_bytes(work_of(variant="t2v-14b").shape) == pytest.approx(28.6e9, rel=1e-2)


@pytest.mark.parametrize(
    ("gpu", "targets", "modes"),
    [
        ("H100", "attention", ("none",) * 30),
        ("H100", "attention+ffn", ("selective",) * 3 + ("none",) * 27),
        ("RTX 4090", "attention+ffn", ("selective",) * 26 + ("none",) * 4),
        ("RTX 4080", "attention+ffn", ("full",) * 5 + ("selective",) * 25),
    ],
)
def test_a_full_size_clip_on_cards_people_have(gpu, targets, modes):
    assert plan(work_of(targets), budget_of_gpu(GPUS[gpu].memory_bytes)) == modes


@pytest.mark.parametrize("variant", ["t2v-14b", "t2v-a14b"])
@pytest.mark.parametrize(
    ("bucket", "tflop", "gigabytes"),
    [
        (FULL_SIZE, 4714, (312, 83.8, 56.5)),
        (Bucket(49, 480, 832), 2193, (206, 64.0, 47.1)),
        (Bucket(81, 720, 1280), 20_161, (677, 151.8, 88.8)),
    ],
)
def test_a_transformer_of_14b_takes_what_was_counted(variant, bucket, tflop, gigabytes):
    """Rank 32 on attention and FFN, compiled, bf16; an expert of A14B is one such transformer."""
    work = work_of("attention+ffn", variant, num_tokens=num_tokens(bucket))
    assert model_flops(work) == pytest.approx(1e12 * tflop, abs=0.5e12)
    for mode, size in zip(("none", "selective", "full"), gigabytes, strict=True):
        rounding = 0.5e9 if size > 200 else 0.06e9
        assert step_bytes(work, (mode,) * 40).total == pytest.approx(1e9 * size, abs=rounding)


def test_the_14b_model_trains_at_full_size_on_one_80_gb_card():
    work = work_of("attention+ffn", "t2v-14b")
    limit = budget_of_gpu(GPUS["H100"].memory_bytes)
    assert step_bytes(work, plan(work, limit)).total <= limit


@given(gigabytes=st.floats(1, 120), compiled=st.booleans(), batch=st.integers(1, 4))
def test_a_plan_fits_and_one_more_block_kept_would_not(gigabytes, compiled, batch):
    work = work_of("attention+ffn", compiled=compiled, batch_size=batch)
    modes = plan(work, gigabytes * 1e9)
    order = {"offload": 0, "full": 1, "selective": 2, "none": 3}
    assert list(modes) == sorted(modes, key=order.get)  # what keeps most comes last
    if step_bytes(work, modes).total > gigabytes * 1e9:
        assert set(modes) == {"offload"}
        return
    better = {"offload": "full", "full": "selective", "selective": "none"}
    dearest = next((i for i in reversed(range(30)) if modes[i] != "none"), None)
    if dearest is not None and len(set(modes)) > 1:
        last_of_worst = modes.index(modes[-1]) - 1
        more = list(modes)
        more[last_of_worst] = better[more[last_of_worst]]
        assert step_bytes(work, more).total > gigabytes * 1e9


def test_the_longest_clip_is_the_longest_that_fits():
    work = work_of("attention+ffn")
    found = longest_clip(work, FULL_SIZE, "selective", 12e9)
    assert found

    def size(frames: int) -> float:
        tokens = num_tokens(FULL_SIZE._replace(num_frames=frames))
        return step_bytes(replace(work, num_tokens=tokens), ("selective",) * 30).total

    assert size(found.num_frames) <= 12e9 < size(found.num_frames + 4)
    assert longest_clip(work, FULL_SIZE, "full", 1e9) is None
