"""Cutting and splitting."""

import pytest

from wanlora.prepare.cuts import Cut, cuts, held_out, unique_ids


def cut(available, **changes):
    settings = {"num_frames": 81, "fps": 16.0, "mode": "chunk", "short": "trim", "min_frames": 17}
    return cuts(available, **(settings | changes))


def test_chunks_lie_end_to_end_and_never_overlap():
    found = cut(250)
    assert found == [Cut(0.0, 81), Cut(81 / 16, 81), Cut(162 / 16, 81)]


def test_head_takes_the_first_clip_only():
    assert cut(250, mode="head") == [Cut(0.0, 81)]


@pytest.mark.parametrize(
    ("available", "kept"), [(80, 77), (81, 81), (17, 17), (20, 17), (16, None), (0, None)]
)
def test_short_videos_are_trimmed_to_4k_plus_1(available, kept):
    assert cut(available) == ([] if kept is None else [Cut(0.0, kept)])


def test_short_videos_are_dropped_on_request():
    assert cut(80, short="drop") == []
    assert cut(81, short="drop") == [Cut(0.0, 81)]


GROUPS = {f"{activity}{k}": activity for activity in "abcd" for k in range(25)}


def test_the_split_is_a_function_of_seed_and_names():
    first = held_out(GROUPS, val_fraction=0.12, seed=0)
    again = held_out(dict(reversed(GROUPS.items())), val_fraction=0.12, seed=0)
    assert first == again
    assert first != held_out(GROUPS, val_fraction=0.12, seed=1)


def test_the_split_has_the_share_asked_for_in_every_activity():
    found = held_out(GROUPS, val_fraction=0.12, seed=0)
    assert len(found) == 12
    assert all(sum(GROUPS[group] == activity for group in found) == 3 for activity in "abcd")


def test_the_split_never_leaves_training_empty_nor_validation_when_two_groups_exist():
    assert held_out({"a": "x"}, val_fraction=0.9, seed=0) == set()
    assert len(held_out({"a": "x", "b": "x"}, val_fraction=0.01, seed=0)) == 1
    assert len(held_out({"a": "x", "b": "x"}, val_fraction=0.99, seed=0)) == 1
    assert held_out(GROUPS, val_fraction=0.0, seed=0) == set()


def test_equal_names_are_numbered():
    assert unique_ids(["a", "b", "a", "a"]) == ["a", "b", "a-2", "a-3"]
