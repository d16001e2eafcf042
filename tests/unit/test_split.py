"""Which groups are held out."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanlora.commands.prepare.split import LARGE, draw, held_out

LARGE_SET = {f"{activity}{k}": activity for activity in "abcd" for k in range(250)}
NAMES = st.text("abcdefgh", min_size=1, max_size=6)
SETS = st.dictionaries(NAMES, st.sampled_from("xyz"), min_size=1, max_size=30)
SHARES = st.floats(0.01, 0.9)


def sets_of(*sizes):
    return {f"{name}{k}": name for name, size in zip("abcdefgh", sizes, strict=False)
            for k in range(size)}  # fmt: skip


def held_by_activity(groups, val_fraction, seed=0):
    found = held_out(groups, val_fraction=val_fraction, seed=seed)
    return Counter(groups[name] for name in found)


def test_the_split_is_a_function_of_seed_and_names():
    for groups in (LARGE_SET, sets_of(9, 9, 9)):
        first = held_out(groups, val_fraction=0.2, seed=0)
        assert first == held_out(dict(reversed(groups.items())), val_fraction=0.2, seed=0)
        assert any(first != held_out(groups, val_fraction=0.2, seed=seed) for seed in range(1, 9))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("sizes", "val_fraction", "expected"),
    [
        ((4, 4, 4, 4), 0.3, [1, 1, 1, 2]),  # 16 videos of 4 activities
        ((4, 4, 4, 4), 0.05, [1]),
        ((10, 10, 10), 0.2, [2, 2, 2]),
        ((2, 30), 0.1, [1, 2]),  # the share is enough for one of each
        ((16,), 0.3, [5]),
        ((3, 1), 0.5, [2]),  # the only group of an activity is trained
        ((1, 1, 1, 1), 0.25, [1]),  # every video in a folder of its own
    ],
)
def test_a_small_set_is_balanced(sizes, val_fraction, expected, seed):
    assert sorted(held_by_activity(sets_of(*sizes), val_fraction, seed).values()) == expected


def test_every_activity_of_a_large_set_has_about_the_share_asked_for():
    for count in held_by_activity(LARGE_SET, 0.12).values():
        assert 15 <= count <= 45  # binomial: 30 of 250, standard deviation 5.1


@given(SETS, SHARES)
def test_every_activity_of_two_groups_keeps_one_for_training(groups, val_fraction):
    held = held_by_activity(groups, val_fraction)
    sizes = Counter(groups.values())
    assert all(held[name] < size for name, size in sizes.items() if size > 1)
    assert bool(held) == (len(groups) > 1)
    if round(val_fraction * len(groups) - 1e-9) >= len(sizes):
        assert all(held[name] for name, size in sizes.items() if size > 1)


@given(SETS, NAMES, st.sampled_from("xyz"), SHARES)
def test_a_new_video_moves_few_others_of_a_small_set(groups, name, activity, val_fraction):
    if name in groups or val_fraction * (len(groups) + 1) >= LARGE:
        return
    before = held_out(groups, val_fraction=val_fraction, seed=0)
    after = held_out(groups | {name: activity}, val_fraction=val_fraction, seed=0)
    assert len((before ^ after) - {name}) <= 3


def test_the_draws_of_a_large_activity_stay_near_its_share():
    groups = sets_of(27)
    counts = [sum(held_by_activity(groups, 0.3, seed).values()) for seed in range(300)]
    assert min(counts) == 5  # a half of 8.1, rounded up
    assert max(counts) == 12


def test_a_new_video_moves_no_other_of_a_large_set():
    before = held_out(LARGE_SET, val_fraction=0.12, seed=0)
    more = LARGE_SET | {f"new{k}": "abcd"[k % 4] for k in range(100)}
    assert held_out(more, val_fraction=0.12, seed=0) & LARGE_SET.keys() == before
    assert before == {name for name in LARGE_SET if draw(name, 0) < 0.12}


def test_the_side_that_a_person_chose_is_kept():
    found = held_out(LARGE_SET, val_fraction=0.5, seed=0, chosen={"a1": "val", "b1": "train"})
    assert "a1" in found
    assert "b1" not in found
    assert held_out({"a": "x"}, val_fraction=0.0, seed=0, chosen={"a": "val"}) == {"a"}
    assert held_out(LARGE_SET, val_fraction=0.0, seed=0) == set()


def test_groups_that_a_person_chose_count_in_the_share():
    groups = sets_of(4, 4, 4, 4)
    chosen = {"a0": "val", "a1": "val", "a2": "val", "b0": "train"}
    found = held_out(groups, val_fraction=0.3, seed=0, chosen=chosen)
    assert Counter(groups[name] for name in found) == {"a": 3, "b": 1, "c": 1, "d": 1}
    assert "b0" not in found
