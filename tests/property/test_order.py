from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from wanlora.core.buckets import Bucket
from wanlora.core.order import Order, num_steps

BUCKETS = [Bucket(frames, 16, 16) for frames in (1, 5, 9, 17)]
sizes = st.dictionaries(st.sampled_from(BUCKETS), st.integers(1, 30), min_size=1)


batch_sizes = st.fixed_dictionaries({bucket: st.integers(1, 9) for bucket in BUCKETS})


@given(sizes=sizes, batch_size=batch_sizes, seed=st.integers(0, 2**63 - 1))
@settings(max_examples=60, deadline=None)
def test_every_bucket_shows_each_clip_once_an_epoch(sizes, batch_size, seed):
    order = Order(sizes, batch_size=batch_size, seed=seed)
    streams: dict[Bucket, list[int]] = {}
    for step in range(40):
        batch = order.batch(step)
        assert len(batch.indices) == batch_size[batch.bucket]
        streams.setdefault(batch.bucket, []).extend(batch.indices)
    for bucket, stream in streams.items():
        size = sizes[bucket]
        for start in range(0, len(stream) - size + 1, size):
            assert sorted(stream[start : start + size]) == list(range(size))
        assert (
            max(Counter(stream).values()) - min(Counter(stream).values()) <= 1 or len(stream) < size
        )


@given(sizes=sizes, batch_size=batch_sizes, seed=st.integers(0, 2**63 - 1))
@settings(max_examples=60, deadline=None)
def test_all_buckets_are_always_in_the_same_epoch(sizes, batch_size, seed):
    """A bucket of w steps an epoch has had e w - 1 to (e + 1) w + 1 of them: one e fits all."""
    order = Order(sizes, batch_size=batch_size, seed=seed)
    pace = {bucket: Fraction(size, batch_size[bucket]) for bucket, size in sizes.items()}
    assert order.steps_per_epoch == sum(pace.values())
    taken = Counter(dict.fromkeys(sizes, 0))
    for step in range(80):
        taken[order.batch(step).bucket] += 1
        least = max((taken[bucket] - 1) / pace[bucket] - 1 for bucket in sizes)
        most = min((taken[bucket] + 1) / pace[bucket] for bucket in sizes)
        assert max(least, 0) <= most


@given(sizes=sizes, batch_size=batch_sizes, step=st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_a_step_is_the_same_whichever_steps_were_asked_for_before(sizes, batch_size, step):
    fresh = Order(sizes, batch_size=batch_size, seed=1)
    used = Order(dict(reversed(sizes.items())), batch_size=batch_size, seed=1)
    for other in (step + 3, 0, step // 2):
        used.batch(other)
    assert fresh.batch(step) == used.batch(step)


def test_an_epoch_has_the_steps_of_every_bucket_shuffled():
    order = Order({BUCKETS[0]: 300, BUCKETS[1]: 100}, batch_size=2, seed=4)
    drawn = [order.batch(step).bucket for step in range(400)]
    for epoch in (drawn[:200], drawn[200:]):
        assert Counter(epoch) == {BUCKETS[0]: 150, BUCKETS[1]: 50}
    assert drawn[:200] != drawn[200:]
    assert 20 < Counter(drawn[:100])[BUCKETS[1]] < 30


def test_a_bucket_smaller_than_its_batch_comes_as_often_as_its_clips_ask_for():
    """Eight images, 80 a step, beside 100 videos: a step of images every ten epochs."""
    order = Order(
        {BUCKETS[0]: 8, BUCKETS[1]: 100}, batch_size={BUCKETS[0]: 80, BUCKETS[1]: 1}, seed=0
    )
    drawn = Counter(order.batch(step).bucket for step in range(3003))
    assert drawn[BUCKETS[0]] == 3


def test_epochs_differ_and_seeds_differ():
    order = Order({BUCKETS[0]: 50}, batch_size=50, seed=0)
    assert order.batch(0).indices != order.batch(1).indices
    assert order.batch(0).indices != Order({BUCKETS[0]: 50}, batch_size=50, seed=1).batch(0).indices


def test_steps_are_rounded_up_to_show_every_clip():
    assert num_steps(Fraction(10, 4), num_epochs=1) == 3
    assert num_steps(Fraction(8000, 8), num_epochs=10) == 10000
    assert num_steps(Fraction(1, 8), num_epochs=0.1) == 1
    assert num_steps(Fraction(7, 3), num_epochs=3) == 7
    assert num_steps(Fraction(10), num_epochs=0.1) == 1


def test_balanced_every_activity_comes_once_a_round_and_its_clips_once_an_epoch():
    activities = ["walk"] * 6 + ["sit"] * 3 + ["clap"]
    order = Order({BUCKETS[0]: 10}, batch_size=3, seed=2, activities={BUCKETS[0]: activities})
    batches = [order.batch(step).indices for step in range(12)]
    for batch in batches:
        assert sorted(activities[i] for i in batch) == ["clap", "sit", "walk"]
    walks = [i for batch in batches for i in batch if activities[i] == "walk"]
    assert sorted(walks[:6]) == sorted(walks[6:]) == list(range(6))
    assert walks[:6] != walks[6:]


def test_threads_that_read_ahead_see_the_order_that_one_sees():
    sizes = {BUCKETS[0]: 30, BUCKETS[1]: 20}
    alone = Order(sizes, batch_size=2, seed=5)
    expected = [alone.batch(step) for step in range(300)]
    for _ in range(5):
        shared = Order(sizes, batch_size=2, seed=5)
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(shared.batch, range(300))) == expected
