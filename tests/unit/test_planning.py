"""The chosen plan fits, its seconds are those of the predictions, and streaming has to pay."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_memory import work_of
from wanlora.commands.estimate.cards import CARDS, MODELS, SIZES, fits_of_cards, table
from wanlora.core.buckets import Bucket, num_tokens
from wanlora.cost.gpus import GPUS
from wanlora.cost.memory import plan, step_bytes
from wanlora.cost.planning import MIN_GAIN, fastest_plan
from wanlora.cost.seconds import predict_seconds
from wanlora.cost.streaming import predict_streaming
from wanlora.training import fitting
from wanlora.training.workload import budget_of_gpu

SMALL = Bucket(17, 480, 832)


@settings(max_examples=10, deadline=None)
@given(
    gigabytes=st.floats(8, 120), gpu=st.sampled_from(list(CARDS.values())),
    variant=st.sampled_from(list(MODELS)), clip=st.sampled_from(SIZES),
    kind=st.sampled_from(["none", "int8"]),
)  # fmt: skip
def test_a_plan_is_counted_as_it_runs(gigabytes, gpu, variant, clip, kind):
    work = work_of("attention+ffn", variant, num_tokens=num_tokens(clip), quantize=kind)
    limit, rates = gigabytes * 1e9, GPUS[gpu]
    found = fastest_plan(work, limit, rates)
    streamed = replace(work, num_streamed=found.num_streamed)
    assert found.total_bytes == step_bytes(streamed, found.modes).total
    waits = predict_streaming(streamed, found.modes, rates).exposed_s
    expected = predict_seconds(streamed, found.modes, rates).total + waits
    assert found.seconds == pytest.approx(expected, rel=1e-6)
    resident = plan(work, limit)
    seconds = predict_seconds(work, resident, rates).total
    if step_bytes(work, resident).total <= limit:
        assert found.total_bytes <= limit
        assert found.seconds <= seconds * (1 + 1e-9)
        if found.num_streamed:
            assert found.seconds < (1 - MIN_GAIN) * seconds
    elif found.total_bytes <= limit:
        assert found.num_streamed
        fewer = replace(work, num_streamed=found.num_streamed - 1)
        assert step_bytes(fewer, found.modes).total > limit


def test_14b_on_a_card_of_24_gb_streams_and_a_model_that_fits_does_not():
    limit = budget_of_gpu(GPUS["RTX 4090"].memory_bytes)
    small = num_tokens(SMALL)
    large = fastest_plan(
        work_of("attention+ffn", "t2v-14b", num_tokens=small), limit, GPUS["RTX 4090"]
    )
    assert large.num_streamed > 30
    assert large.total_bytes <= limit
    assert fastest_plan(work_of("attention+ffn"), limit, GPUS["RTX 4090"]).num_streamed == 0
    assert fastest_plan(work_of("attention+ffn"), limit, None).num_streamed == 0


def test_settings_are_kept():
    work = work_of("attention+ffn", "t2v-14b", num_tokens=num_tokens(SMALL))
    found = fastest_plan(work, 24e9, None, modes=("full",) * 40, num_streamed=7)
    assert (found.modes, found.num_streamed) == (("full",) * 40, 7)


def test_advice_after_out_of_memory_names_smaller_weights_with_their_bytes():
    work = work_of("attention+ffn", "t2v-14b", num_tokens=num_tokens(SMALL))
    limit = budget_of_gpu(GPUS["L40S"].memory_bytes) / 1.5
    text = fitting._advice("auto", work, SMALL, limit, on_gpu=True)
    streamed = fastest_plan(work, limit, None)
    assert f"--stream-blocks {streamed.num_streamed} ({streamed.total_bytes / 1e9:.3g} GB" in text
    assert "--quantize int8 (" in text
    assert "--stream-blocks" not in fitting._advice("auto", work, SMALL, limit, on_gpu=False)


def test_the_table_covers_every_card_model_and_size():
    fits = fits_of_cards(rank=32, adapted="attention+ffn")
    assert len(fits) == len(CARDS) * len(MODELS) * len(SIZES)
    by_row = [fits[i : i + len(CARDS)] for i in range(0, len(fits), len(CARDS))]
    for row in by_row:
        assert [fit.card_gb for fit in row] == sorted(CARDS)
        assert [fit.fits for fit in row] == sorted(fit.fits for fit in row)  # larger cards fit more
        for fit in row:
            limit = budget_of_gpu(GPUS[fit.gpu].memory_bytes) / 1e9
            assert fit.fits == (fit.peak_gb <= limit)
    lines = table(fits)
    assert max(map(len, lines)) <= 100
    assert all(sum(f"{fit.card_gb} GB, {fit.gpu}" in line for line in lines) == 8 for fit in fits)
