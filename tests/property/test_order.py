from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from wanlora.core.buckets import Bucket
from wanlora.core.shares import balanced_shares, shares
from wanlora.training.batch_sizes import BatchSize
from wanlora.training.order import Order, describe_untrained, num_steps

BUCKETS = [Bucket(frames, 16, 16) for frames in (1, 5, 9, 17)]
RECORDED = [
    (5, 1, 4),
    (17, 1, 2),
    (5, 3, 0),
    (5, 2, 4),
    (5, 3, 2),
    (17, 0, 0),
    (5, 0, 1),
    (17, 2, 1),
]
RECORDED_BALANCED = [(3, 2, 0), (0, 1, 3), (4, 3, 0), (3, 1, 0)]

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


@st.composite
def weighted(draw):
    """Sizes, global batches and weights of some buckets."""
    number = draw(sizes)
    weight = st.one_of(st.integers(1, 4).map(float), st.floats(0.05, 5))
    weights = {b: draw(st.lists(weight, min_size=n, max_size=n)) for b, n in sorted(number.items())}
    return number, draw(batch_sizes), weights


@given(case=weighted(), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=60, deadline=None)
def test_each_clip_is_drawn_as_often_as_its_weight_to_within_one(case, seed):
    """Of the draws of its bucket that make whole epochs; in the order, one more may be open."""
    number, batch_size, weights = case
    order = Order(number, batch_size=batch_size, seed=seed, weights=weights)
    drawn: dict[Bucket, Counter[int]] = {bucket: Counter() for bucket in number}
    for step in range(60):
        batch = order.batch(step)
        drawn[batch.bucket].update(batch.indices)
    for bucket, counts in drawn.items():
        total, number_drawn = sum(weights[bucket]), counts.total()
        epochs = number_drawn / total
        # Rounding to whole draws moves the epoch's end by less than a draw per clip.
        slack = 1 + len(weights[bucket]) / total
        for index, weight in enumerate(weights[bucket]):
            assert abs(counts[index] - epochs * weight) <= 2 + slack * weight


@given(seed=st.integers(0, 2**63 - 1), weights=st.lists(st.integers(1, 5), min_size=1, max_size=9))
@settings(max_examples=40, deadline=None)
def test_a_whole_weight_is_exact_in_every_epoch(seed, weights):
    bucket, total = BUCKETS[0], sum(weights)
    order = Order(
        {bucket: len(weights)}, batch_size=1, seed=seed, weights={bucket: list(map(float, weights))}
    )
    assert order.steps_per_epoch == total
    for epoch in range(4):
        steps = range(epoch * total, (epoch + 1) * total)
        counts = Counter(order.batch(step).indices[0] for step in steps)
        assert [counts[i] for i in range(len(weights))] == weights


def test_a_fraction_of_a_weight_is_exact_over_epochs_and_differs_between_clips():
    bucket, weights = BUCKETS[0], [0.25] * 8 + [1.5] * 4
    order = Order({bucket: 12}, batch_size=1, seed=3, weights={bucket: weights})
    draws = [order.batch(step).indices[0] for step in range(8 * 40)]  # 40 epochs of 8 draws
    counts = Counter(draws)
    for index, weight in enumerate(weights):
        assert abs(counts[index] - 40 * weight) <= 2
    assert len({tuple(draws[i : i + 8]) for i in range(0, 320, 8)}) == 40


@given(case=weighted(), step=st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_a_weighted_step_is_the_same_after_a_resume_and_on_any_number_of_processes(case, step):
    number, _, weights = case
    size = BatchSize(micro_batch=2, num_micro_batches=4)
    batch_size = dict.fromkeys(number, size.global_batch)
    fresh = Order(number, batch_size=batch_size, seed=1, weights=weights)
    used = Order(number, batch_size=batch_size, seed=1, weights=weights)
    for other in (step + 3, 0, step // 2):
        used.batch(other)
    expected = fresh.batch(step)
    assert used.batch(step) == expected
    for world in (1, 2, 4):
        slots = [
            slot
            for rank in range(world)
            for micro_batch in size.slots(rank=rank, world=world)
            for slot in micro_batch
        ]
        assert [used.batch(step).indices[slot] for slot in slots] == list(expected.indices)


@given(sizes=sizes, batch_size=batch_sizes, seed=st.integers(0, 2**63 - 1))
@settings(max_examples=40, deadline=None)
def test_weights_of_1_change_nothing(sizes, batch_size, seed):
    plain = Order(sizes, batch_size=batch_size, seed=seed)
    weights = {bucket: [1.0] * size for bucket, size in sizes.items()}
    same = Order(sizes, batch_size=batch_size, seed=seed, weights=weights)
    assert same.steps_per_epoch == plain.steps_per_epoch
    assert [same.batch(step) for step in range(30)] == [plain.batch(step) for step in range(30)]


def test_the_order_without_weights_is_that_of_release_0_1_0():
    """Recorded with 0.1.0: a changed order would break the resume of every run."""
    order = Order({BUCKETS[1]: 5, BUCKETS[3]: 3}, batch_size=2, seed=11)
    assert [(batch.bucket.num_frames, *batch.indices) for batch in map(order.batch, range(8))] == (
        RECORDED
    )
    activities = {BUCKETS[1]: list("abbcb")}
    order = Order({BUCKETS[1]: 5}, batch_size=3, seed=11, activities=activities)
    assert [order.batch(step).indices for step in range(4)] == RECORDED_BALANCED


def test_balanced_activities_stay_balanced_and_weights_count_inside_them():
    bucket, activities = BUCKETS[0], ["walk", "walk", "sit"]
    order = Order(
        {bucket: 3}, batch_size=2, seed=2, activities={bucket: activities},
        weights={bucket: [3.0, 1.0, 1.0]},
    )  # fmt: skip
    counts = Counter(index for step in range(80) for index in order.batch(step).indices)
    assert counts == {0: 60, 1: 20, 2: 80}


def test_shares_of_draws_are_those_of_the_weights():
    clips = [("walk", 1.0), ("walk", 2.0), ("sit", 1.0)]
    assert shares(clips) == {"sit": 0.25, "walk": 0.75}
    bucket = BUCKETS[0]
    order = Order({bucket: 3}, batch_size=4, seed=0, weights={bucket: [w for _, w in clips]})
    counts = Counter(clips[i][0] for step in range(100) for i in order.batch(step).indices)
    assert counts["sit"] / counts.total() == 0.25


def test_shares_of_balanced_draws_are_those_of_the_buckets():
    """Activities are balanced inside a bucket, and each bucket keeps its share."""
    clips = {BUCKETS[0]: ["walk", "walk", "walk", "sit"], BUCKETS[1]: ["run"] * 4}
    counts = [len(names) for names in clips.values()]
    found = balanced_shares((bucket, name, 1.0) for bucket in clips for name in clips[bucket])
    assert found == {"run": 0.5, "sit": 0.25, "walk": 0.25}
    sizes = dict(zip(clips, counts, strict=True))
    order = Order(sizes, batch_size=2, seed=0, activities=clips)
    batches = [order.batch(step) for step in range(400)]
    drawn = Counter(clips[batch.bucket][index] for batch in batches for index in batch.indices)
    assert {name: number / drawn.total() for name, number in drawn.items()} == found


@given(sizes=sizes, batch_size=batch_sizes, end_step=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_steps_by_bucket_are_those_of_the_order(sizes, batch_size, end_step):
    order = Order(sizes, batch_size=batch_size, seed=3)
    counted = Counter(order.batch(step).bucket for step in range(end_step))
    assert order.steps_by_bucket(end_step) == {bucket: counted[bucket] for bucket in sizes}


def test_a_bucket_without_a_step_is_named_with_the_epochs_that_give_it_one():
    """56 and 16 clips of two sizes beside one image, of which a step takes 80."""
    image, *others = BUCKETS[:3]
    number = {image: 1, others[0]: 16, others[1]: 56}
    batch = {image: 80, others[0]: 4, others[1]: 1}
    order = Order(number, batch_size=batch, seed=0)
    ten_epochs = num_steps(order.steps_per_epoch, num_epochs=10)
    (problem,) = describe_untrained(order, number, batch, end_step=ten_epochs)
    needed = order.epochs_until(image)
    for fact in ("1x16x16", "80 clips", f"--num-epochs {needed} ", "--batch-by clips"):
        assert fact in problem
    enough = num_steps(order.steps_per_epoch, num_epochs=needed)
    assert describe_untrained(order, number, batch, end_step=enough) == []
    too_few = num_steps(order.steps_per_epoch, num_epochs=needed - 1)
    assert describe_untrained(order, number, batch, end_step=too_few)


@given(sizes=sizes, batch_size=batch_sizes, seed=st.integers(0, 2**63 - 1))
@settings(max_examples=40, deadline=None)
def test_the_epochs_named_are_enough_for_a_step_of_each_bucket(sizes, batch_size, seed):
    order = Order(sizes, batch_size=batch_size, seed=seed)
    for bucket in sizes:
        epochs = order.epochs_until(bucket)
        steps = num_steps(order.steps_per_epoch, num_epochs=epochs)
        assert bucket in {order.batch(step).bucket for step in range(steps)}


def test_every_bucket_is_named_also_when_all_steps_have_the_same_number_of_clips():
    number = {BUCKETS[0]: 1, BUCKETS[1]: 40}
    order = Order(number, batch_size=16, seed=4)
    (problem,) = describe_untrained(order, number, dict.fromkeys(number, 16), end_step=3)
    assert "1x16x16" in problem
    assert "--batch-by" not in problem
