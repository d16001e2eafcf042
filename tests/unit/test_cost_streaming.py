"""Bytes and time of streamed blocks, against timelines worked out by hand."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_memory import work_of
from wanlora.cost.gpus import GPUS
from wanlora.cost.memory import (
    block_linear_bytes,
    host_bytes,
    resident_bytes,
    step_bytes,
    streamed_blocks,
    weight_bytes,
)
from wanlora.cost.seconds import predict_seconds
from wanlora.cost.streaming import exposed_seconds, predict_streaming


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_streamed_blocks_are_distinct_and_evenly_spaced(sizes):
    num_layers, num_streamed = sizes
    blocks = streamed_blocks(num_layers, num_streamed)
    assert len(blocks) == num_streamed
    assert all(0 <= block < num_layers for block in blocks)
    gaps = {after - before for before, after in pairwise(blocks)}
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)


def test_a_streamed_block_is_in_host_memory_and_two_slots_are_on_the_device():
    work = work_of(variant="t2v-14b")
    block = 2 * (8 * 5120**2 + 2 * 5120 * 13824)
    assert block_linear_bytes(work.shape) == block
    for num_streamed, away in ((0, 0), (1, 0), (2, 0), (3, 1), (40, 38)):
        streamed = replace(work, num_streamed=num_streamed)
        assert resident_bytes(streamed) == weight_bytes(work.shape) - away * block
        assert host_bytes(streamed) == num_streamed * block
        modes = ("full",) * 40
        gained = step_bytes(work, modes).total - step_bytes(streamed, modes).total
        assert gained == away * block


def test_eight_bits_take_half_of_a_block_and_a_scale_for_each_feature():
    shape = work_of(variant="t2v-14b").shape
    saved = weight_bytes(shape) - weight_bytes(shape, quantize="int8")
    scales = 40 * 2 * (9 * 5120 + 13824)
    assert saved == 40 * block_linear_bytes(shape, quantize="int8") - scales
    assert saved == pytest.approx(14e9, rel=0.01)


def test_copies_that_are_shorter_than_a_block_are_hidden():
    assert exposed_seconds([1.0] * 6, [3.0] * 6, range(6), copy_s=1.0) == 0


def test_of_longer_copies_the_blocks_between_hide_their_share():
    # Blocks of 1 s; copies of 4 s, one after the other. Forward, 0 and 1 are there; the copy of 2
    # starts when 0 ends (1 s) and ends at 5; that of 3 ends at 9. 2 waits from 2 to 5, 3 from 6 to
    # 9. Backward, 3 and 2 are there; the copy of 1 starts at 11, that of 0 at 15, after it.
    waits = exposed_seconds([1.0] * 4, [1.0] * 4, range(4), copy_s=4.0)
    assert waits == (5 - 2) + (9 - 6) + (15 - 12) + (19 - 16)
    # With a resident block before each streamed one, copies have twice the time.
    assert exposed_seconds([1.0] * 8, [1.0] * 8, range(8), copy_s=2.0) > 0
    assert exposed_seconds([1.0] * 8, [1.0] * 8, range(1, 8, 2), copy_s=2.0) == 0


def test_with_one_slot_every_block_waits_for_its_copy():
    """Block swapping as trainers usually do it: copy, wait, compute."""
    waits = exposed_seconds([1.0] * 6, [3.0] * 6, range(6), copy_s=0.5, slots=1)
    assert waits == (5 + 5) * 0.5
    assert exposed_seconds([1.0] * 6, [3.0] * 6, range(6), copy_s=0.5, slots=2) == 0


def test_two_or_fewer_streamed_blocks_are_copied_once_and_never_again():
    for num_streamed in (0, 1, 2):
        found = predict_streaming(
            replace(work_of(variant="t2v-14b"), num_streamed=num_streamed), ("full",) * 40,
            GPUS["RTX 4090"],
        )  # fmt: skip
        assert (found.copied_bytes, found.exposed_s) == (0, 0)


def test_14b_streams_for_free_at_full_size_and_not_for_short_clips():
    """The 0.70 GB of a block take 35 ms at 20 GB/s."""
    work = replace(work_of(variant="t2v-14b"), num_streamed=40)
    modes = ("full",) * 40
    found = predict_streaming(work, modes, GPUS["RTX 4090"])
    assert found.copied_bytes == 2 * 38 * block_linear_bytes(work.shape)
    assert found.copy_s == pytest.approx(2 * 38 * 0.0351, rel=0.01)
    assert found.exposed_s == 0
    short = predict_streaming(replace(work, num_tokens=1560), modes, GPUS["H100"])
    assert 0.5 * short.copy_s < short.exposed_s < short.copy_s
    eight_bit = replace(work, num_tokens=1560, quantize="int8")
    assert predict_streaming(eight_bit, modes, GPUS["H100"]).exposed_s < 0.6 * short.exposed_s


DOCS = Path(__file__).parents[2] / "docs" / "performance.md"
CLIPS = {"1×480×832": 1560, "17×480×832": 7800, "49×480×832": 20_280, "81×480×832": 32_760}
LONGER = {"81×720×1280": 75_600}


def test_the_tables_in_the_docs_are_the_counts():
    page = DOCS.read_text(encoding="utf-8")
    work = work_of("attention+ffn", "t2v-14b")
    full, offload = ("full",) * 40, ("offload",) * 40
    for name, num_tokens in (CLIPS | LONGER).items():
        here = replace(work, num_tokens=num_tokens)
        streamed = replace(here, num_streamed=40)
        if num_tokens > 1560:
            eight_bit = replace(streamed, quantize="int8")
            peaks = ((streamed, full), (streamed, offload), (eight_bit, offload))
            cells = [f"{step_bytes(*peak).total / 1e9:.1f}" for peak in peaks]
            assert f"| {name} | {' | '.join(cells)} |" in page
        if name in LONGER:
            continue
        cells = [f"{step_bytes(each, full).total / 1e9:.1f}" for each in (here, streamed)]
        for card in ("RTX 4090", "H100"):
            gpu = GPUS[card]
            waits = [
                predict_streaming(streamed, full, gpu, slots=slots).exposed_s for slots in (2, 1)
            ]
            seconds = predict_seconds(streamed, full, gpu).total
            shown = f"{seconds:.0f}" if seconds > 20 else f"{seconds:.1f}"
            cells += [
                f"{seconds:.2f}" if seconds < 1 else shown,
                "; ".join(f"{wait:.1f}".removesuffix(".0") for wait in waits),
            ]
        assert f"| {name} | {' | '.join(cells)} |" in page
