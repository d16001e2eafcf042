"""Colours of videos against the equations of BT.601 and BT.709, by tag, size and range."""

import av
import numpy as np
import pytest

from tests.support.clips import clip
from wanlora.data.clip import clip_key
from wanlora.data.clip_frames import load_clip
from wanlora.errors import MediaError
from wanlora.media import decode, probe

YUV = (90, 100, 190)
BT601, BT709 = (0.299, 0.114), (0.2126, 0.0722)
TAGS = {"bt709": 1, "smpte170m": 6, "unspecified": 2}
LIMITED, FULL = 1, 2


def write_flat(
    path, *, height, width, matrix="unspecified", colour_range=LIMITED, pix="yuv444p", num_frames=1
):
    """One colour in every pixel, lossless."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.height, stream.width, stream.pix_fmt = height, width, pix
        context = stream.codec_context
        context.colorspace, context.color_range = TAGS[matrix], colour_range
        planes = np.stack([np.full((height, width), value, np.uint8) for value in YUV])
        for _ in range(num_frames):
            if pix == "yuv444p":
                frame = av.VideoFrame.from_ndarray(planes, format=pix)
            else:
                frame = av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(planes.transpose(1, 2, 0)), format="rgb24"
                ).reformat(format=pix)
            frame.colorspace, frame.color_range = TAGS[matrix], colour_range
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def rgb_of(weights, *, full=False):
    """ITU-R BT.601-7 and BT.709-6: E'Y = Kr R + (1 - Kr - Kb) G + Kb B, then 8-bit levels."""
    kr, kb = weights
    y, cb, cr = (np.array(YUV) - (0, 128, 128)) / 255
    if not full:
        y, cb, cr = (YUV[0] - 16) / 219, (YUV[1] - 128) / 224, (YUV[2] - 128) / 224
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    return (np.clip([red, green, blue], 0, 1) * 255).round()


def decoded(path):
    info = probe.scan(path).info
    frames = decode.decode(path, start_s=0, fps=16, num_frames=1, matrix=info.assumed_matrix)
    return info, frames[0, 8, 8]


@pytest.mark.parametrize(
    ("height", "width", "weights"),
    [
        (720, 1280, BT709),
        (544, 1280, BT709),  # a wide film in HD
        (832, 480, BT709),
        (578, 64, BT709),
        (576, 1024, BT601),
        (480, 832, BT601),
    ],
)
def test_video_without_a_matrix_is_read_as_players_read_it(tmp_path, height, width, weights):
    path = write_flat(tmp_path / "a.mkv", height=height, width=width)
    info, found = decoded(path)
    assert info.matrix == "unspecified"
    assert info.assumed_matrix == ("bt709" if weights is BT709 else None)
    assert np.abs(found - rgb_of(weights)).max() <= 1


@pytest.mark.parametrize(("matrix", "weights"), [("bt709", BT709), ("smpte170m", BT601)])
@pytest.mark.parametrize("size", [(720, 1280), (96, 160)])
def test_a_named_matrix_wins_over_the_size(tmp_path, matrix, weights, size):
    path = write_flat(tmp_path / "a.mkv", height=size[0], width=size[1], matrix=matrix)
    info, found = decoded(path)
    assert (info.matrix, info.assumed_matrix) == (matrix, None)
    assert np.abs(found - rgb_of(weights)).max() <= 1
    forced = decode.decode(path, start_s=0, fps=16, num_frames=1, matrix="bt709")
    assert np.array_equal(forced[0, 8, 8], found)


@pytest.mark.parametrize(("size", "weights"), [((720, 1280), BT709), ((96, 160), BT601)])
def test_full_range_is_read_as_full_range(tmp_path, size, weights):
    path = write_flat(tmp_path / "a.mkv", height=size[0], width=size[1], colour_range=FULL)
    assert np.abs(decoded(path)[1] - rgb_of(weights, full=True)).max() <= 1


@pytest.mark.parametrize("pix", ["bgr0", "gray"])
def test_rgb_and_grey_need_no_matrix(tmp_path, pix):
    path = write_flat(tmp_path / "a.mkv", height=720, width=1280, pix=pix)
    assert probe.scan(path).info.assumed_matrix is None


def test_the_matrix_is_part_of_a_clips_identity_and_an_old_line_keeps_its_pixels(tmp_path):
    path = write_flat(tmp_path / "a.mkv", height=720, width=1280)
    old = clip(path=path, height=32, width=48, num_frames=1)
    new = clip(path=path, height=32, width=48, num_frames=1, transform={"matrix": "bt709"})
    assert clip_key(old, "0" * 64) != clip_key(new, "0" * 64)
    assert np.abs(load_clip(old)[0, :, 8, 8].numpy() - rgb_of(BT601)).max() <= 1
    assert np.abs(load_clip(new)[0, :, 8, 8].numpy() - rgb_of(BT709)).max() <= 1


@pytest.mark.parametrize("rule", ["matrix", "timestamps"])
def test_an_unknown_pixel_rule_in_a_line_is_refused(tmp_path, rule):
    path = write_flat(tmp_path / "a.mkv", height=32, width=48)
    with pytest.raises(MediaError, match=rf"{rule} 'bt2020'.*wanlora prepare"):
        load_clip(clip(path=path, height=32, width=48, transform={rule: "bt2020"}))
