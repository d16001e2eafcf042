"""Which frame is taken, and that it stands upright."""

from fractions import Fraction

import numpy as np
import pytest

from tests.support import videos
from wanlora.errors import MediaError
from wanlora.media import decode, probe


def numbers(path, **cut):
    return [videos.number_in(frame) for frame in decode.decode(path, **cut)]


def expected(fps, *, start_s, at_fps, num_frames):
    """Constant rate: the last frame that starts by start + k/fps, in exact arithmetic."""
    return [
        int((Fraction(start_s) + Fraction(k) / Fraction(at_fps)) * Fraction(fps))
        for k in range(num_frames)
    ]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts", "a.mov"])
@pytest.mark.parametrize("start_s", [0.0, 1.0625, 4.0])
def test_25_fps_becomes_16_by_presentation_time(tmp_path, name, start_s):
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    path = videos.write_video(tmp_path / name, num_frames=150, codec=codec)
    found = numbers(path, start_s=start_s, fps=16, num_frames=25)
    assert found == expected(25, start_s=start_s, at_fps=16, num_frames=25)


def test_the_same_rate_gives_every_frame_once_although_matroska_rounds_times(tmp_path):
    path = videos.write_video(tmp_path / "a.mkv", num_frames=90, fps=30)
    assert numbers(path, start_s=0, fps=30, num_frames=90) == list(range(90))


def test_long_gops_with_b_frames_are_sought_back_far_enough(tmp_path):
    path = videos.write_video(tmp_path / "a.mp4", num_frames=240, gop=250, b_frames=4)
    assert numbers(path, start_s=8.0, fps=25, num_frames=5) == list(range(200, 205))


def test_a_variable_rate_takes_the_frame_on_screen(tmp_path):
    times = [0, 100, 150, 900, 1000, 1010, 1020, 1500, 1600]
    path = videos.write_video(tmp_path / "a.mkv", num_frames=9, times_ms=times)
    found = numbers(path, start_s=0, fps=10, num_frames=16)
    assert found == [0, 1, 2, 2, 2, 2, 2, 2, 2, 3, 4, 6, 6, 6, 6, 7]


def test_a_low_rate_repeats_frames_and_warps_nothing(tmp_path):
    path = videos.write_video(tmp_path / "a.mp4", num_frames=20, fps=8)
    assert numbers(path, start_s=0.5, fps=16, num_frames=6) == [4, 4, 5, 5, 6, 6]


@pytest.mark.parametrize("clockwise", [0, 90, 180, 270])
def test_rotated_videos_come_out_upright(tmp_path, clockwise):
    path = videos.write_video(tmp_path / "a.mp4", height=128, width=160, clockwise=clockwise)
    frames = decode.decode(path, start_s=0.4, fps=25, num_frames=3)
    assert frames.shape == (3, 128, 160, 3)
    assert [videos.number_in(frame) for frame in frames] == [10, 11, 12]
    lower = frames[0, 100].astype(int)
    assert lower[5, 0] > lower[-5, 0]  # red fades to the right


def test_odd_sizes_and_ten_bits_decode(tmp_path):
    path = videos.write_video(
        tmp_path / "a.mkv", height=97, width=161, codec="ffv1", pix_fmt="yuv444p10le", b_frames=0
    )
    frames = decode.decode(path, start_s=0, fps=25, num_frames=3)
    assert frames.shape == (3, 97, 161, 3)
    assert [videos.number_in(frame) for frame in frames] == [0, 1, 2]


def test_colours_of_tagged_bt709_survive(tmp_path):
    from wanlora.media import mp4

    frames = np.zeros((5, 64, 64, 3), np.uint8)
    frames[:] = (200, 30, 60)
    mp4.write(tmp_path / "a.mp4", frames, fps=16)
    back = decode.decode(tmp_path / "a.mp4", start_s=0, fps=16, num_frames=5)
    assert np.abs(back.astype(int) - frames).max() <= 4


def test_a_cut_past_the_end_says_where_both_end(tmp_path):
    path = videos.write_video(tmp_path / "a.mp4", num_frames=25)
    with pytest.raises(MediaError, match=r"1\.250 s, .*1\.000 s") as raised:
        decode.decode(path, start_s=0.25, fps=16, num_frames=17)
    assert raised.value.code == "too_short"


def test_the_last_frame_that_a_timeline_promises_can_be_decoded(tmp_path):
    for num_frames, fps in ((25, 25), (33, 24000 / 1001), (40, 30), (20, 8)):
        path = videos.write_video(tmp_path / "a.mp4", num_frames=num_frames, fps=fps)
        [(_, available)] = probe.scan(path).timeline.parts((), 16)
        assert len(decode.decode(path, start_s=0, fps=16, num_frames=available)) == available


def test_a_damaged_frame_in_the_cut_is_refused(tmp_path):
    path = videos.write_bit_rotten(tmp_path / "a.mp4")
    with pytest.raises(MediaError) as raised:
        decode.decode(path, start_s=0, fps=25, num_frames=250)
    assert raised.value.code == "corrupt_at"


def test_decoding_is_deterministic():
    path = videos.real_videos()["bikes"]
    a, b = (decode.decode(path, start_s=3.3, fps=16, num_frames=5) for _ in range(2))
    assert np.array_equal(a, b)


def test_a_seek_gives_what_reading_from_the_start_gives():
    path = videos.real_videos()["bikes"]
    whole = decode.decode(path, start_s=0, fps=25, num_frames=250)
    for first in (1, 77, 149, 245):
        cut = decode.decode(path, start_s=first / 25, fps=25, num_frames=5)
        assert np.array_equal(cut, whole[first : first + 5])
