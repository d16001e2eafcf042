"""Still images as clips of one frame."""

import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from tests.support.clips import clip
from wanlora.data.clip_frames import load_clip
from wanlora.errors import MediaError
from wanlora.media import image


def drawn(height=60, width=100):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    return pixels


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp", "a.jpg"])
def test_every_kind_is_read(tmp_path, name):
    Image.fromarray(drawn()).save(tmp_path / name, **({"lossless": True} if "webp" in name else {}))
    found = image.read(tmp_path / name)
    assert found.shape == (1, 60, 100, 3)
    assert np.abs(found[0, 30, [10, 90]].astype(int) - drawn()[30, [10, 90]]).max() <= 2
    assert image.read_checked(tmp_path / name) == image.Picture(100, 60, alpha=False)


def test_the_exif_tag_turns_and_transparency_becomes_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees
    Image.fromarray(drawn()).save(tmp_path / "a.png", exif=exif)
    turned = image.read(tmp_path / "a.png")
    assert turned.shape == (1, 100, 60, 3)
    assert turned[0, 10, 30].tolist() == [255, 0, 0]
    rgba = np.dstack([drawn(), np.zeros((60, 100), np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "b.png")
    assert image.read(tmp_path / "b.png").min() == 255
    assert image.read_checked(tmp_path / "b.png").alpha


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path, name):
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(tmp_path / name)
    assert np.unique(image.read(tmp_path / name)).tolist() == [40000 >> 8]


def test_pixels_of_no_known_range_are_refused(tmp_path):
    Image.fromarray(np.full((20, 20), 0.5, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(MediaError, match=r"a\.tif.*expected 8 or 16 bits"):
        image.read_checked(tmp_path / "a.tif")


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_what_moves_is_no_image(tmp_path, name):
    first, *others = (Image.fromarray(drawn() // n) for n in (1, 2, 3))
    first.save(tmp_path / name, save_all=True, append_images=others)
    with pytest.raises(MediaError, match="3 frames"):
        image.read_checked(tmp_path / name)


def test_of_several_pages_the_first_is_taken(tmp_path):
    first, other = (Image.fromarray(drawn() // n) for n in (1, 2))
    first.save(tmp_path / "a.tif", save_all=True, append_images=[other])
    assert image.read(tmp_path / "a.tif").max() == 255


def test_palettes_and_cmyk_are_read(tmp_path):
    Image.fromarray(drawn()).convert("CMYK").save(tmp_path / "a.tif")
    assert image.read(tmp_path / "a.tif")[0, 30, 10].tolist() == [255, 0, 0]
    Image.fromarray(drawn()).quantize(8).save(tmp_path / "b.png")
    assert image.read(tmp_path / "b.png")[0, 30, 10].tolist() == [255, 0, 0]


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_broken_images_are_refused(tmp_path, keep):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MediaError, match=r"a\.png") as raised:
        image.read_checked(path)
    assert raised.value.code == "unreadable"


def test_a_text_file_is_refused_with_the_formats_that_can_be_read(tmp_path):
    path = tmp_path / "text.jpg"
    path.write_text("hello")
    with pytest.raises(MediaError, match="PNG") as raised:
        image.read(path)
    assert raised.value.code == "unreadable"
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("size", [(9_000, 10_000), (40_000, 40_000)])
def test_an_image_that_would_fill_the_memory_is_refused_by_its_header(tmp_path, size):
    height, width = size
    Image.fromarray(drawn()).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(MediaError, match=r"a\.png.*89,?478,?485") as raised:
        image.read(tmp_path / "a.png")
    assert raised.value.code == "bad_size"


def test_reading_in_a_thread_leaves_the_warning_filters_of_the_others_alone(tmp_path):
    path = tmp_path / "a.png"
    os.mkfifo(path)
    before = list(warnings.filters)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(image.read, path)
        with path.open("wb"):  # opens once the thread is inside
            during = list(warnings.filters)
        assert isinstance(reading.exception(), MediaError)
    assert during == before


def test_a_clip_of_an_image_has_one_frame(tmp_path):
    Image.fromarray(drawn(120, 200)).save(tmp_path / "a.png")
    still = clip(kind="images", num_frames=1, path=tmp_path / "a.png")
    assert load_clip(still).shape == (1, 3, 32, 48)
    with pytest.raises(MediaError, match="one frame"):
        load_clip(clip(kind="images", num_frames=17, path=tmp_path / "a.png"))
