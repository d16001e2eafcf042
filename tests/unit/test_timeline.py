"""Which frames a clip gets from rounded, uneven and unknown timestamps."""

from fractions import Fraction

import numpy as np
import pytest

from wanlora.media.timeline import Timeline, count_repeats, target_ticks

MS, CS = Fraction(1, 1000), Fraction(1, 100)


def timeline(num_frames, fps, unit, *, last_ticks=1):
    """Times of a constant rate as a muxer rounds them, half up."""
    ticks = [int(Fraction(k) / Fraction(fps) / unit + Fraction(1, 2)) for k in range(num_frames)]
    return Timeline.of(ticks, time_base=unit, last_ticks=last_ticks)


def shown_in(whole, part, fps, num_frames):
    return whole.shown(start_s=part.start_s, fps=fps, num_frames=num_frames).tolist()


def test_times_survive_packing():
    ticks = [0, 7, 7, 1_000_000_000_000, 1_000_000_000_001]
    assert Timeline.of(ticks, time_base=MS, last_ticks=1).ticks().tolist() == ticks
    assert Timeline.of([3], time_base=MS, last_ticks=1).ticks().tolist() == [0]


def test_an_hour_of_video_stays_small():
    assert len(timeline(108_000, Fraction(30000, 1001), MS).gaps) < 20_000


@pytest.mark.parametrize("num_frames", [17, 33, 49, 81])
@pytest.mark.parametrize("unit", [MS, CS, Fraction(1, 16), Fraction(1, 90_000)])
@pytest.mark.parametrize("last_ticks", [1, 10_000_000])
def test_the_time_of_the_last_frame_counts_whatever_its_duration(num_frames, unit, last_ticks):
    found = timeline(num_frames, 16, unit, last_ticks=last_ticks)
    [part] = found.parts((), 16)
    if last_ticks == 1:
        assert part == (0.0, num_frames)
    else:  # a last frame that is held is not cut off
        assert part.available > num_frames
    assert shown_in(found, part, 16, num_frames) == list(range(num_frames))


@pytest.mark.parametrize("fps", [Fraction(24000, 1001), 30, 60])
@pytest.mark.parametrize("unit", [MS, Fraction(1, 90_000)])
def test_a_scene_that_starts_at_a_rounded_time_loses_no_frame(fps, unit):
    whole = timeline(90, fps, unit)
    for cut in range(17, 60):
        at = float(int(whole.ticks()[cut]) * unit)
        before, after = whole.parts([at], float(fps))
        assert (before.available, after.available) == (cut, 90 - cut)
        assert shown_in(whole, after, float(fps), 90 - cut) == list(range(cut, 90))


def test_exact_timestamps_keep_the_start_of_a_scene():
    whole = timeline(90, 25, Fraction(1, 12_800))
    assert not whole.rounded
    assert whole.parts([1.6], 16)[1].start_s == 1.6


def test_a_coarse_gif_at_16_fps_shows_each_frame_once():
    found = timeline(81, 16, CS)
    assert found.coarse
    assert count_repeats(found.shown(start_s=0, fps=16, num_frames=81)) == (0, 1)
    # With the tolerance of Matroska, 20 frames would come out twice.
    targets = target_ticks(CS, start_s=0, fps=16, num_frames=81)
    assert count_repeats(np.searchsorted(found.ticks(), targets, side="right")) == (20, 2)


@pytest.mark.parametrize(
    ("unit", "fps"), [(CS, 25), (MS, 16), (Fraction(1, 16), 16), (Fraction(1, 12_800), 16)]
)
def test_only_rounding_to_10_ms_is_coarse(unit, fps):
    assert not timeline(81, fps, unit).coarse


def test_repeated_frames_are_counted_by_clip():
    ticks = [0, 100, 150, 900, 1000, 1010, 1020, 1500, 1600]
    found = Timeline.of(ticks, time_base=MS, last_ticks=100)
    shown = found.shown(start_s=0, fps=10, num_frames=16)
    assert shown.tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 2, 3, 4, 6, 6, 6, 6, 7]
    assert count_repeats(shown) == (9, 7)
    assert count_repeats(found.shown(start_s=0.9, fps=10, num_frames=2)) == (0, 1)
