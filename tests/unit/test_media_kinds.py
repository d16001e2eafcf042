"""Every kind of file: the right frame after every seek, upright, or a reason."""

from fractions import Fraction

import numpy as np
import pytest

from tests.support import videos
from wanlora.errors import MediaError
from wanlora.media import decode, probe

NUM_FRAMES = 60


def numbers(path, *, first, count=3):
    cut = decode.decode(path, start_s=first / 25, fps=25, num_frames=count)
    return [videos.number_in(frame) for frame in cut]


@pytest.mark.parametrize("name", videos.KINDS)
def test_every_seek_in_every_kind_gives_the_right_frames(tmp_path, name):
    codec, setup = videos.KINDS[name]
    path = videos.write_video(tmp_path / name, num_frames=NUM_FRAMES, codec=codec, **setup)
    found = probe.scan(path, detector="builtin")
    assert (found.num_frames, found.cuts_s) == (NUM_FRAMES, ())
    assert found.span_s == pytest.approx(NUM_FRAMES / 25, abs=2e-3)
    assert found.fps == pytest.approx(25, rel=1e-3)
    for first in (*range(0, NUM_FRAMES - 3, 7), NUM_FRAMES - 3):
        assert numbers(path, first=first) == [first, first + 1, first + 2]


@pytest.mark.parametrize("skip", [3, 17])
def test_an_edit_list_moves_the_start_and_nothing_before_it_is_shown(tmp_path, skip):
    path = videos.write_edit_list(tmp_path / "a.mp4", skip=skip, num_frames=NUM_FRAMES)
    assert probe.scan(path).num_frames == NUM_FRAMES - skip
    assert numbers(path, first=0) == [skip, skip + 1, skip + 2]
    assert numbers(path, first=20) == [skip + 20, skip + 21, skip + 22]


@pytest.mark.parametrize("large_first", [True, False])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_of_two_video_streams_the_default_one_is_taken(tmp_path, name, large_first):
    path = videos.write_two_streams(tmp_path / name, large_first=large_first)
    found = probe.scan(path)
    assert (found.info.height, found.num_frames) == (96, 60)
    assert numbers(path, first=31) == [31, 32, 33]


@pytest.mark.parametrize("clockwise", [0, 90, 180, 270])
def test_mirrored_videos_come_out_as_they_were_seen(tmp_path, clockwise):
    path = videos.write_video(
        tmp_path / "a.mp4", height=128, width=160, clockwise=clockwise, mirrored=True
    )
    frames = decode.decode(path, start_s=0.4, fps=25, num_frames=2)
    assert frames.shape == (2, 128, 160, 3)
    assert [videos.number_in(frame) for frame in frames] == [10, 11]
    assert frames[0, 100, 5, 0] > frames[0, 100, -5, 0]  # red fades to the right
    assert probe.scan(path).info.mirrored


def test_interlaced_video_is_recognized(tmp_path):
    assert not probe.scan(
        videos.write_video(tmp_path / "a.mpg", codec="mpeg2video")
    ).info.interlaced
    path = videos.write_video(tmp_path / "b.mpg", codec="mpeg2video", interlaced=True, b_frames=0)
    assert probe.scan(path).info.interlaced


@pytest.mark.parametrize("size", [(97, 161), (98, 163), (33, 65)])
def test_odd_sizes_keep_every_row_and_column(tmp_path, size):
    height, width = size
    path = videos.write_video(
        tmp_path / "a.mp4", height=height, width=width, codec="mpeg4", b_frames=0
    )
    assert decode.decode(path, start_s=0, fps=25, num_frames=1).shape == (1, *size, 3)


def test_a_variable_rate_is_exact_after_every_seek(tmp_path):
    times = [0]
    for number in range(1, 120):
        times.append(times[-1] + (20, 33, 47, 110)[number * number % 4])
    path = videos.write_video(tmp_path / "a.mkv", num_frames=120, times_ms=times, gop=30)
    for start_ms in np.arange(0.2, times[-1] - 500, 163):  # no tie with a time rounded to 1 ms
        cut = decode.decode(path, start_s=start_ms / 1000, fps=16, num_frames=4)
        wanted = [
            max(i for i, t in enumerate(times) if t <= start_ms + k * 62.5 + 0.5) for k in range(4)
        ]
        assert [videos.number_in(frame) for frame in cut] == wanted


def test_a_sample_aspect_is_read_in_every_container_that_has_one(tmp_path):
    for name, codec in (("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.mpg", "mpeg2video")):
        aspect = Fraction(16, 15) if codec == "libx264" else Fraction(4, 3) / Fraction(160, 96)
        path = videos.write_video(tmp_path / name, codec=codec, sample_aspect=aspect)
        assert probe.scan(path).info.sample_aspect == pytest.approx(aspect)


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", ["h264.mkv", "vp9.webm", "mpeg4.avi", "mpeg4.mp4", "wmv2.wmv"])
def test_a_truncated_file_of_any_container_is_refused(tmp_path, name, keep):
    codec, setup = videos.KINDS[name]
    path = videos.write_video(tmp_path / name, num_frames=100, codec=codec, **setup)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    try:
        left = probe.scan(path)
    except MediaError as error:
        assert error.code in {"truncated", "corrupt_at", "unreadable"}  # noqa: PT017
    else:
        assert left.span_s >= 0.95 * 4  # only the index at the end is missing
        assert keep == 0.9
