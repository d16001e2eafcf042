"""Every frame of a 16 fps video, once and in order, from every container and both writers."""

import shutil
import subprocess

import numpy as np
import pytest

from tests.support import videos
from wanlora.media import decode, probe, recorded

FFMPEG = shutil.which("ffmpeg")
CONTAINERS = {
    "mp4": ("libx264", {}),
    "mkv": ("libx264", {}),
    "webm": ("libvpx-vp9", {"b_frames": 0}),
    "flv": ("flv1", {"b_frames": 0}),
    "ts": ("libx264", {}),
    "avi": ("mpeg4", {}),
    "mov": ("libx264", {}),
    "gif": ("gif", {"pix_fmt": "rgb8", "b_frames": 0}),
}
LENGTHS = (17, 33, 49, 81)


def frames_at_16_fps(path):
    """Numbers of the frames of one clip as long as the video."""
    found = probe.scan(path)
    [part] = found.timeline.parts((), 16)
    cut = decode.decode(
        path, start_s=0, fps=16, num_frames=part.available, coarse=found.timeline.coarse
    )
    return [videos.number_in(frame) for frame in cut]


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_pyav_files_keep_every_frame(tmp_path, suffix):
    codec, setup = CONTAINERS[suffix]
    for length in LENGTHS:
        path = videos.write_video(
            tmp_path / f"{length}.{suffix}", num_frames=length, fps=16, codec=codec, **setup
        )
        assert frames_at_16_fps(path) == list(range(length))


@pytest.mark.skipif(FFMPEG is None, reason="the ffmpeg program is not installed")
@pytest.mark.parametrize("suffix", CONTAINERS)
def test_files_of_the_ffmpeg_program_keep_every_frame(tmp_path, suffix):
    for length in LENGTHS:
        source = videos.write_video(tmp_path / f"{length}.src.mp4", num_frames=length, fps=16)
        path = tmp_path / f"{length}.{suffix}"
        subprocess.run(
            [FFMPEG, "-v", "error", "-i", source, "-c:v", CONTAINERS[suffix][0], "-q:v", "2", path],
            check=True,
        )
        assert frames_at_16_fps(path) == list(range(length))


@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif"])
def test_wanloras_own_files_keep_every_frame(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    frames = np.stack([videos.numbered_frame(k, height=96, width=160) for k in range(81)])
    recorded.write(path, frames, record={"prompt": "numbers", "fps": 16.0})
    assert frames_at_16_fps(path) == list(range(81))
    assert probe.scan(path).span_s == pytest.approx(81 / 16, abs=0.006)
