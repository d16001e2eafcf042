"""What a video is, and which files are refused with which code."""

import shlex
import shutil
import subprocess
from fractions import Fraction

import pytest

from tests.support import videos
from wanlora.errors import MediaError
from wanlora.media import decode, probe


def test_real_videos_are_measured_as_they_are():
    real = videos.real_videos()
    bikes = probe.scan(real["bikes"])
    assert (bikes.num_frames, bikes.info.width, bikes.info.height) == (250, 640, 272)
    assert bikes.span_s == pytest.approx(10.0)
    assert bikes.fps == pytest.approx(25.0)
    carphone = probe.scan(real["carphone_pristine"])
    assert carphone.info.sample_aspect == Fraction(128, 117)
    assert carphone.fps == pytest.approx(30000 / 1001)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts"])
def test_every_container_gives_the_same_span(tmp_path, name):
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    path = videos.write_video(tmp_path / name, num_frames=40, codec=codec)
    scan = probe.scan(path)
    assert scan.num_frames == 40
    assert scan.span_s == pytest.approx(1.6, abs=1e-3)
    assert scan.fps == pytest.approx(25)


def test_sound_that_outlasts_the_video_does_not_look_like_truncation(tmp_path):
    for name in ("a.mp4", "a.mkv"):
        path = videos.write_video(tmp_path / name, audio=True)
        assert probe.scan(path).span_s == pytest.approx(2.4, abs=1e-3)


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv"])
def test_a_video_cut_without_encoding_starts_late_and_is_whole(tmp_path, name):
    source = videos.write_video(tmp_path / "a.mp4", num_frames=100, gop=30)
    path = videos.write_stream_copy(tmp_path / name, source, start_s=1.3)
    assert probe.scan(path).span_s == pytest.approx(2.8, abs=1e-3)
    frames = decode.decode(path, start_s=1, fps=25, num_frames=3)
    assert [videos.number_in(frame) for frame in frames] == [55, 56, 57]


@pytest.mark.parametrize(
    ("code", "write"),
    [
        ("no_video", videos.write_audio),
        ("unreadable", videos.write_text),
        ("truncated", videos.write_truncated),
        ("corrupt_at", videos.write_bit_rotten),
        ("unreadable", lambda path: path.touch() or path),
        ("missing", lambda path: path),
    ],
)
def test_broken_files_are_refused_with_a_code_and_their_name(tmp_path, code, write):
    path = write(tmp_path / "bad.mp4")
    with pytest.raises(MediaError, match=r"bad\.mp4") as raised:
        probe.scan(path)
    assert raised.value.code == code


def test_rotation_swaps_the_size_and_inverts_the_sample_aspect(tmp_path):
    path = videos.write_video(
        tmp_path / "a.mp4", height=160, width=96, clockwise=90, sample_aspect=Fraction(2)
    )
    info = probe.scan(path).info
    assert (info.height, info.width, info.rotation) == (160, 96, 3)
    assert info.sample_aspect == Fraction(1, 2)


@pytest.mark.parametrize(("transfer", "name"), [(videos.PQ, "PQ"), (videos.HLG, "HLG")])
def test_hdr_is_recognized(tmp_path, transfer, name):
    path = videos.write_video(tmp_path / "a.mp4", transfer=transfer)
    assert name in (probe.scan(path).info.hdr or "")


@pytest.mark.parametrize("suffix", ["ts", "h264"])
def test_the_advice_for_a_video_that_a_copy_does_not_repair_repairs_it(tmp_path, suffix):
    """Two transport streams, one after the other; and packets without a container."""
    part = videos.write_video(tmp_path / f"part.{suffix}", num_frames=25)
    path = tmp_path / "it's two.ts"
    path.write_bytes(2 * part.read_bytes())
    with pytest.raises(MediaError, match="again: ffmpeg") as refused:
        probe.scan(path)
    if shutil.which("ffmpeg") is None:
        pytest.skip("Debian's ffmpeg is not installed")
    command = str(refused.value).partition("encode it again: ")[2]
    subprocess.run([*shlex.split(command), "-loglevel", "error"], check=True)
    assert probe.scan(path.with_name("it's two-encoded.mp4")).num_frames == 50


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_an_empty_file_is_called_empty(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(MediaError, match=r"empty \(0 bytes\)"):
        probe.scan(tmp_path / name)
