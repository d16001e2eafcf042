"""Writing mp4: what comes back, and that it appears whole."""

import json
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image

from wanlora.errors import MediaError
from wanlora.media import decode, mp4, recorded
from wanlora.media.quality import psnr


def smooth_frames(num_frames=17, height=96, width=160):
    t, y, x = np.meshgrid(
        np.linspace(0, 1, num_frames), np.linspace(0, 1, height), np.linspace(0, 1, width),
        indexing="ij",
    )  # fmt: skip
    channels = [np.sin(3 * x + 2 * t), np.cos(2 * y - t), np.sin(x + y + t)]
    return ((np.stack(channels, -1) + 1) * 127.5).astype(np.uint8)


def test_frames_come_back_close_and_counted(tmp_path):
    frames = smooth_frames()
    mp4.write(tmp_path / "new" / "a.mp4", frames, fps=16)
    back = decode.decode(tmp_path / "new" / "a.mp4", start_s=0, fps=16, num_frames=17)
    assert psnr(back, frames) > 35
    with av.open(str(tmp_path / "new" / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate) == (17, 16)
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")


def test_metadata_is_recorded(tmp_path):
    tags = {"title": "A cat — on a mat", "comment": '{"seed": 3}'}
    mp4.write(tmp_path / "a.mp4", smooth_frames(5), fps=16, metadata=tags)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert {key: container.metadata[key] for key in tags} == tags


def test_the_index_comes_before_the_frames(tmp_path):
    mp4.write(tmp_path / "a.mp4", smooth_frames(5), fps=16)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_equal_frames_give_equal_bytes_without_the_part_of_x264_that_varies(tmp_path):
    codec = replace(mp4.H264, options={**mp4.H264.options, "mbtree": "0"})
    for name in ("a.mp4", "b.mp4"):
        mp4.write(tmp_path / name, smooth_frames(9), fps=16, codec=codec)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("size", [(95, 160), (96, 161)])
def test_odd_sizes_are_refused(tmp_path, size):
    with pytest.raises(MediaError, match=f"{size[1]}x{size[0]}") as raised:
        mp4.write(tmp_path / "a.mp4", smooth_frames(5, *size), fps=16)
    assert raised.value.code == "bad_size"
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(mp4, "publish", fail)
    with pytest.raises(KeyboardInterrupt):
        mp4.write(path, smooth_frames(5), fps=16)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert path.read_bytes() == b"old"


def test_a_small_copy_for_a_page_is_no_higher_than_asked_for_and_plays(tmp_path):
    frames = smooth_frames(height=96, width=160)
    data = mp4.small(frames, fps=16, height=48)
    (tmp_path / "small.mp4").write_bytes(data)
    back = decode.decode(tmp_path / "small.mp4", start_s=0, fps=16, num_frames=17)
    assert back.shape == (17, 48, 80, 3)
    mp4.write(tmp_path / "whole.mp4", frames, fps=16)
    assert len(data) < (tmp_path / "whole.mp4").stat().st_size
    (tmp_path / "same.mp4").write_bytes(mp4.small(frames, fps=16, height=480))
    assert decode.decode(tmp_path / "same.mp4", start_s=0, fps=16, num_frames=1).shape[1] == 96


def test_a_gif_repeats_and_says_how_it_was_made(tmp_path):
    frames = np.stack([np.full((16, 32, 3), 10 * step, np.uint8) for step in range(6)])
    recorded.write(tmp_path / "a.gif", frames, record={"prompt": "fading", "fps": 16.0, "seed": 3})
    with Image.open(tmp_path / "a.gif") as picture:
        assert (picture.size, picture.n_frames, picture.info["loop"]) == ((32, 16), 6, 0)
        assert json.loads(picture.info["comment"])["seed"] == 3
        picture.seek(5)
        assert np.asarray(picture.convert("RGB"))[0, 0].tolist() == [50, 50, 50]
    assert recorded.read_record(tmp_path / "a.gif")["prompt"] == "fading"
