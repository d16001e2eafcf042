"""Declared sizes are checked before memory is taken, and every library error names its file."""

import io
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import videos
from tests.support.clips import clip
from wanlora.core import aspect
from wanlora.data import npz
from wanlora.data.clip_frames import load_clip
from wanlora.errors import MediaError
from wanlora.media import decode, frames, image, probe

SMALL = {"height": 32, "width": 48}


def gif_header(path, height, width):
    data = bytearray(videos.write_video(path, codec="gif", pix_fmt="rgb8", b_frames=0).read_bytes())
    data[6:10] = struct.pack("<HH", width, height)
    path.write_bytes(data)
    return path


def npz_with(path, shape, data=b"\0" * 768):
    """A member whose header declares `shape`, whatever its data are."""
    member = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("frames.npy", member.getvalue() + data)
    return path


def refusal(read, *arguments, **settings):
    """Call, and return the refusal and the megabytes that Python and numpy took meanwhile."""
    tracemalloc.start()
    try:
        with pytest.raises(MediaError) as raised:
            read(*arguments, **settings)
        return raised.value, tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def test_a_video_that_declares_a_huge_frame_is_refused_by_its_header(tmp_path):
    error, megabytes = refusal(probe.scan, gif_header(tmp_path / "a.gif", 16_000, 16_000))
    assert error.code == "bad_size"
    assert "a.gif" in str(error)
    assert "16000x16000" in str(error)
    assert f"{aspect.MAX_PICTURE_PX:,}" in str(error)
    assert megabytes < 10


def test_a_frame_that_is_larger_than_the_header_is_not_decoded(tmp_path, monkeypatch):
    path = videos.write_video(tmp_path / "a.mp4")
    monkeypatch.setattr(frames, "size_problem", lambda height, width: None)
    monkeypatch.setattr(frames, "MAX_PICTURE_PX", 160 * 96 - 1)
    with pytest.raises(MediaError, match=r"a\.mp4"):
        probe.scan(path)


@pytest.mark.parametrize(
    ("shape", "code"),
    [
        ((17, 1_000_000, 1_000_000, 3), "bad_npz"),
        ((10**12, 16, 16, 3), "bad_npz"),
        ((5, 16, 16, 3), "bad_npz"),
        ((-1, 16, -16, 3), "bad_size"),
    ],
)
def test_an_npz_whose_header_and_size_differ_is_refused(tmp_path, shape, code):
    path = npz_with(tmp_path / "a.npz", shape)
    for read in (npz.read, npz.read_size, npz.read_checked):
        error, megabytes = refusal(read, path)
        assert error.code == code
        assert "a.npz" in str(error)
        assert megabytes < 10


def test_an_npz_that_is_larger_than_any_clip_is_refused_before_it_is_unpacked(tmp_path):
    """A zip of a few kilobytes may unpack to gigabytes."""
    path = tmp_path / "a.npz"
    side = 16 * 4096
    member = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (1, side, side, 3)}
    np.lib.format.write_array_header_1_0(member, header)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("frames.npy", member.getvalue())
    data = bytearray(path.read_bytes())
    size = struct.pack("<I", (len(member.getvalue()) + 3 * side * side) % 2**32)
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.index(signature) + offset
        data[at : at + 4] = size
    path.write_bytes(data)
    error, megabytes = refusal(npz.read, path)
    assert error.code in {"bad_npz", "bad_size"}
    assert megabytes < 10


@pytest.mark.parametrize("size", [(12_000, 1), (1, 12_000)])
def test_a_picture_too_long_and_narrow_is_refused_before_it_is_scaled(tmp_path, size):
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / "a.png")
    line = clip(path=tmp_path / "a.png", kind="images", num_frames=1, height=480, width=832)
    error, megabytes = refusal(load_clip, line)
    assert error.code == "bad_size"
    assert f"{size[1]}x{size[0]}" in str(error)
    assert "832x480" in str(error)
    assert megabytes < 10


def test_common_sizes_and_panoramas_can_be_scaled():
    for height, width in ((4320, 7680), (7680, 4320), (300, 9000), (96, 160), (1, 100)):
        for clip_size in ((480, 832), (832, 480), (720, 1280)):
            found = aspect.cover_problem(height, width, height=clip_size[0], width=clip_size[1])
            assert found is None


def test_a_malformed_duration_in_matroska_is_as_none(tmp_path):
    path = videos.write_video(tmp_path / "a.mkv")
    data = path.read_bytes()
    assert data.count(b"00:00:02.400000000") == 1
    path.write_bytes(data.replace(b"00:00:02.400000000", b"two seconds, maybe"))
    assert probe.scan(path).num_frames == 60


@pytest.mark.parametrize("error", [ValueError, KeyError, OverflowError, struct.error, OSError])
def test_whatever_a_library_raises_while_a_frame_is_read_names_the_file(
    tmp_path, monkeypatch, error
):
    path = videos.write_video(tmp_path / "a.mp4")

    def fail(*arguments):
        raise error("odd")

    monkeypatch.setattr(decode, "orientation", fail)
    with pytest.raises(MediaError, match=r"a\.mp4") as raised:
        decode.decode(path, start_s=0, fps=16, num_frames=1)
    assert raised.value.code == "unreadable"
    monkeypatch.setattr(probe, "orientation", fail)
    with pytest.raises(MediaError, match=r"a\.mp4"):
        probe.scan(path)


def test_running_out_of_memory_stays_that(tmp_path, monkeypatch):
    path = videos.write_video(tmp_path / "a.mp4")

    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(decode, "orientation", fail)
    with pytest.raises(MemoryError):
        decode.decode(path, start_s=0, fps=16, num_frames=1)


@pytest.mark.parametrize("name", ["a\0b", "\udcff", "x" * 5000])
@pytest.mark.parametrize("read", [probe.scan, image.read, npz.read])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, read, name):
    with pytest.raises(MediaError):
        read(Path(f"{tmp_path}/{name}"))
