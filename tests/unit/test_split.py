"""Which groups are held out."""

from hypothesis import given
from hypothesis import strategies as st

from wanlora.prepare.split import draw, held_out

GROUPS = {f"{activity}{k}": activity for activity in "abcd" for k in range(250)}
NAMES = st.sets(st.text(min_size=1, max_size=8), min_size=1, max_size=30)


def test_the_split_is_a_function_of_seed_and_names():
    first = held_out(GROUPS, val_fraction=0.12, seed=0)
    assert first == held_out(reversed(GROUPS), val_fraction=0.12, seed=0)
    assert first != held_out(GROUPS, val_fraction=0.12, seed=1)


def test_every_activity_has_about_the_share_asked_for():
    found = held_out(GROUPS, val_fraction=0.12, seed=0)
    for activity in "abcd":  # binomial: 30 of 250, standard deviation 5.1
        assert 15 <= sum(GROUPS[group] == activity for group in found) <= 45


@given(NAMES, NAMES, st.floats(0, 0.9))
def test_adding_videos_moves_no_other(before, more, val_fraction):
    old = held_out(before, val_fraction=val_fraction, seed=0)
    new = held_out(before | more, val_fraction=val_fraction, seed=0)
    moved = (old ^ new) & before
    drawn = sum(draw(group, 0) < val_fraction for group in before)
    if drawn in {0, len(before)}:  # a side was empty: one group had to change it
        assert len(moved) <= 1
    else:
        assert not moved


@given(NAMES, st.floats(0, 0.99))
def test_one_group_always_stays_for_training(names, val_fraction):
    assert len(held_out(names, val_fraction=val_fraction, seed=0)) < len(names)


@given(NAMES, st.floats(0.01, 0.99))
def test_of_two_groups_or_more_one_is_held_out(names, val_fraction):
    assert bool(held_out(names, val_fraction=val_fraction, seed=0)) == (len(names) > 1)


def test_what_a_person_chose_stands():
    found = held_out(GROUPS, val_fraction=0.5, seed=0, chosen={"a1": "val", "b1": "train"})
    assert "a1" in found
    assert "b1" not in found
    assert held_out(["a"], val_fraction=0.0, seed=0, chosen={"a": "val"}) == {"a"}
    assert held_out(GROUPS, val_fraction=0.0, seed=0) == set()
