"""What a plain .npz clip must hold."""

import numpy as np
import pytest

from tests.support import videos
from wanlora.data import npz
from wanlora.errors import MediaError


def test_frames_are_read_as_they_are(tmp_path):
    path = videos.write_npz(tmp_path / "a.npz")
    frames = npz.read(path)
    assert frames.shape == (17, 32, 48, 3)
    assert frames[5, 9, 9].tolist() == [5, 5, 5]
    assert npz.read_size(path) == (17, 32, 48)


def test_the_only_array_counts_whatever_its_name(tmp_path):
    assert npz.read(videos.write_npz(tmp_path / "a.npz", key="arr_0")).shape[0] == 17


def test_frames_is_taken_among_several_arrays(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, mask=np.zeros(3), frames=np.zeros((1, 16, 16, 3), np.uint8))
    assert npz.read(path).shape == (1, 16, 16, 3)


def test_compressed_files_are_read(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, frames=np.ones((5, 16, 16, 3), np.uint8))
    assert npz.read(path).sum() == 5 * 16 * 16 * 3


@pytest.mark.parametrize(
    ("code", "message", "arrays"),
    [
        ("bad_npz", "found a, b", {"a": np.zeros(1), "b": np.zeros(1)}),
        ("bad_npz", "expected uint8, found float32", {"frames": np.zeros((1, 16, 16, 3), "f4")}),
        ("bad_npz", r"found \(1, 3, 16, 16\)", {"frames": np.zeros((1, 3, 16, 16), "u1")}),
        ("bad_npz", "expected shape", {"frames": np.zeros((16, 16, 3), "u1")}),
        ("bad_npz", "expected uint8, found object", {"frames": np.array([{}], dtype=object)}),
        ("bad_size", "80 frames; expected 4k", {"frames": np.zeros((80, 16, 16, 3), "u1")}),
        ("bad_size", "width 40 px; expected a mul", {"frames": np.zeros((5, 16, 40, 3), "u1")}),
    ],
)
def test_wrong_clips_are_refused_with_expected_and_found(tmp_path, code, message, arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(MediaError, match=message) as raised:
        npz.read(tmp_path / "a.npz")
    assert raised.value.code == code
    assert "a.npz" in str(raised.value)


def test_files_that_are_no_npz_or_damaged_are_refused(tmp_path):
    whole = videos.write_npz(tmp_path / "whole.npz").read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    cases = {"missing": None, "text": b"text" * 99, "cut": whole[:5000], "damaged": bytes(damaged)}
    for name, data in cases.items():
        path = tmp_path / f"{name}.npz"
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(MediaError) as raised:
            npz.read(path)
        assert raised.value.code == ("missing" if data is None else "bad_npz")


@pytest.mark.parametrize("damage", ["deflate", "method", "encrypted"])
def test_a_damaged_header_is_refused_whatever_the_zip_library_says(tmp_path, damage):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, frames=np.ones((5, 16, 16, 3), np.uint8))
    data = bytearray(path.read_bytes())
    central = data.rindex(b"PK\x01\x02")
    if damage == "deflate":  # zlib.error
        start = data.index(b"frames.npy") + len("frames.npy") + 20
        data[start : start + 8] = b"\xff" * 8
    elif damage == "method":  # NotImplementedError
        data[central + 10] = data[8] = 99
    else:  # RuntimeError
        data[central + 8] |= 1
        data[6] |= 1
    path.write_bytes(data)
    for read in (npz.read_size, npz.read):
        with pytest.raises(MediaError, match=r"a\.npz") as raised:
            read(path)
        assert raised.value.code == "bad_npz"
