"""Steps of images and of long clips cost alike, by FLOPs counted on the real models' shapes."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_memory import work_of
from wanlora.core.buckets import Bucket, num_tokens
from wanlora.cost.flops import step_flops
from wanlora.cost.memory import step_bytes
from wanlora.training.batch_sizes import BatchSize, batch_sizes

LENGTHS = (1, 17, 33, 49, 81)
MIXED = [Bucket(frames, 480, 832) for frames in LENGTHS]
LARGEST = MIXED[-1]


def sizes_of(buckets, work, **changes):
    settings = {"by": "cost", "batch_size": 1, "accumulation": 1} | changes
    return batch_sizes(buckets, work.shape, rank=work.rank, adapted=work.adapted, **settings)


def flops_of(bucket, work):
    tokens = num_tokens(bucket)
    return step_flops(work.shape, tokens, rank=work.rank, adapted=work.adapted).model


@pytest.mark.parametrize("variant", ["t2v-1.3b", "t2v-14b"])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_steps_of_images_and_of_81_frames_are_within_a_fifth_of_each_others_flops(
    variant, batch_size
):
    work = work_of("attention+ffn", variant)
    sizes = sizes_of(MIXED, work, batch_size=batch_size, accumulation=8)
    steps = {b: size.global_batch * flops_of(b, work) for b, size in sizes.items()}
    assert all(0.8 < flops / steps[LARGEST] < 1.2 for flops in steps.values())
    assert sizes[LARGEST] == BatchSize(batch_size, 8)
    # As many clips of each instead would be this far apart.
    assert flops_of(LARGEST, work) / flops_of(MIXED[0], work) > 50


def test_what_the_13b_model_trains_at_once_and_in_a_step():
    """At once never more tokens than one clip of 81 frames, 32,760, its prompt's 512 included."""
    found = sizes_of(MIXED, work_of("attention+ffn"))
    assert [found[bucket] for bucket in MIXED] == [(14, 6), (4, 3), (2, 2), (1, 2), (1, 1)]


def test_by_clips_all_buckets_have_as_many():
    assert set(sizes_of(MIXED, work_of(), by="clips", batch_size=2, accumulation=3).values()) == {
        BatchSize(2, 3)
    }


@settings(max_examples=40, deadline=None)
@given(
    frames=st.lists(st.integers(0, 30), min_size=1, unique=True),
    batch_size=st.integers(1, 6),
    accumulation=st.integers(1, 8),
    variant=st.sampled_from(["t2v-1.3b", "t2v-14b", "micro"]),
    compiled=st.booleans(),
)
def test_no_micro_batch_takes_more_memory_than_the_largest_buckets(
    frames, batch_size, accumulation, variant, compiled
):
    """So a trial of the largest holds for all. Every step can be shared as the largest's can."""
    work = work_of("attention+ffn", variant, compiled=compiled)
    buckets = [Bucket(1 + 4 * k, 480, 832) for k in frames]
    sizes = sizes_of(buckets, work, batch_size=batch_size, accumulation=accumulation)
    largest = max(buckets, key=num_tokens)

    def peak(bucket, way):
        tokens, clips = num_tokens(bucket), sizes[bucket].micro_batch
        own = replace(work, num_tokens=tokens, batch_size=clips)
        return step_bytes(own, (way,) * work.shape.num_layers).total

    assert sizes[largest] == BatchSize(batch_size, accumulation)
    for bucket in buckets:
        assert sizes[bucket].num_micro_batches % accumulation == 0
        assert sizes[bucket].micro_batch >= 1
        for way in ("none", "selective", "full"):
            assert peak(bucket, way) <= peak(largest, way)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_slots_of_a_step_evenly_and_in_order(world):
    size = BatchSize(micro_batch=3, num_micro_batches=8)
    shares = [size.slots(rank=rank, world=world) for rank in range(world)]
    assert {len(micro_batches) for micro_batches in shares} == {8 // world}
    micro_batches = [slots for share in shares for slots in share]
    assert micro_batches == [tuple(range(start, start + 3)) for start in range(0, 24, 3)]
