"""Where a video is cut: every mode, scenes, short ones, lengths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wanlora.commands.prepare.cuts import Cut, Rules, Scene, cuts, unique_ids

RULES = {
    "num_frames": 81, "fps": 16.0, "mode": "chunk", "stride": 40, "count": 4, "short": "trim",
    "min_frames": 17, "lengths": range(1, 82, 4),
}  # fmt: skip


def cut(*scenes, **changes):
    """Scenes given as numbers of frames lie one after the other, with a pause of a second."""
    start, found = 0.0, []
    for available in scenes:
        found.append(Scene(start, available))
        start += available / 16 + 1
    return cuts(found, Rules(**(RULES | changes)))


def test_chunks_lie_end_to_end_and_never_overlap():
    assert cut(250) == [Cut(0.0, 81), Cut(81 / 16, 81), Cut(162 / 16, 81)]


def test_head_takes_the_first_clip_only():
    assert cut(250, mode="head") == [Cut(0.0, 81)]
    assert cut(50, 100, 200, mode="head") == [Cut(50 / 16 + 1, 81)]
    assert cut(20, 50, mode="head") == [Cut(20 / 16 + 1, 49)]


def test_middle_takes_the_middle_of_the_longest_scene():
    assert cut(281, mode="middle") == [Cut(100 / 16, 81)]
    assert cut(20, 101, mode="middle") == [Cut(20 / 16 + 1 + 10 / 16, 81)]
    assert cut(51, mode="middle") == [Cut(1 / 16, 49)]


def test_slide_takes_a_clip_every_stride():
    assert [c.start_s * 16 for c in cut(250, mode="slide")] == [0, 40, 80, 120, 160]
    assert len(cut(250, mode="slide", stride=1)) == 170


def test_uniform_spreads_its_clips_from_the_start_to_the_end():
    assert [c.start_s * 16 for c in cut(381, mode="uniform")] == [0, 100, 200, 300]
    assert cut(381, mode="uniform", count=1) == [Cut(0.0, 81)]
    assert [c.start_s * 16 for c in cut(83, mode="uniform", count=10)] == [0, 1, 2]
    assert len(cut(90, 90, mode="uniform", count=2)) == 2


@pytest.mark.parametrize(
    ("available", "kept"), [(80, 77), (81, 81), (17, 17), (20, 17), (16, None), (0, None)]
)
@pytest.mark.parametrize("mode", ["chunk", "head", "slide", "uniform"])
def test_short_videos_are_trimmed_to_4k_plus_1(available, kept, mode):
    assert cut(available, mode=mode) == ([] if kept is None else [Cut(0.0, kept)])


def test_short_videos_are_dropped_on_request():
    assert cut(80, short="drop") == []
    assert cut(81, short="drop") == [Cut(0.0, 81)]


def test_short_videos_are_trimmed_to_the_longest_of_the_lengths_that_may_be():
    kept = {n: cut(n, lengths=(17, 33, 49)) for n in (16, 17, 32, 33, 80, 81)}
    assert kept.pop(16) == []
    assert [found[0].num_frames for found in kept.values()] == [17, 17, 33, 49, 81]


def test_every_scene_is_cut_on_its_own():
    assert cut(100, 10, 40) == [Cut(0.0, 81), Cut(100 / 16 + 10 / 16 + 2, 37)]


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=4),
    st.sampled_from(["chunk", "head", "middle", "slide", "uniform"]),
    st.sampled_from([17, 49, 81]),
    st.integers(1, 90),
)
def test_no_clip_leaves_its_scene(lengths, mode, num_frames, stride):
    found = cut(*lengths, mode=mode, num_frames=num_frames, stride=stride)
    starts = [sum(lengths[:i]) + 16 * i for i in range(len(lengths))]
    for clip in found:
        first = round(clip.start_s * 16)
        assert clip.num_frames % 4 == 1
        assert any(
            start <= first and first + clip.num_frames <= start + length
            for start, length in zip(starts, lengths, strict=True)
        )
    assert len(set(found)) == len(found)
    assert bool(found) == any(length >= 17 for length in lengths)


def test_equal_names_are_numbered():
    assert unique_ids(["a", "b", "a", "a"]) == ["a", "b", "a-2", "a-3"]
