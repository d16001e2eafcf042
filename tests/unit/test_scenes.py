"""Scene cuts: those that are there, and none that is not."""

import pytest

from tests.support import videos
from wanlora.media import probe
from wanlora.media.scenes import near_certain

REAL_CUTS_S = (1.2, 5.48, 7.48, 9.68)
"""Four of the five hard cuts of bikes.mp4, looked at frame by frame."""


def detector_or_skip(name):
    if name == "pyscenedetect":
        pytest.importorskip("scenedetect", exc_type=ImportError)
    return name


@pytest.mark.parametrize("name", ["builtin", "pyscenedetect"])
def test_hard_cuts_are_found_at_their_first_frame(tmp_path, name):
    path = videos.write_scenes(tmp_path / "a.mp4", [40, 30, 50, 25])
    found = probe.scan(path, detector=detector_or_skip(name))
    assert found.cuts_s == pytest.approx((40 / 25, 70 / 25, 120 / 25))


def test_real_cuts_are_found_to_the_frame():
    path = videos.real_videos()["bikes"]
    assert probe.scan(path, detector="builtin").cuts_s == pytest.approx(REAL_CUTS_S)


def test_pyscenedetect_finds_a_real_cut_more():
    path = videos.real_videos()["bikes"]
    found = probe.scan(path, detector=detector_or_skip("pyscenedetect")).cuts_s
    assert found == pytest.approx((1.2, 3.04, 5.48, 7.48, 9.68))


@pytest.mark.parametrize("name", ["bigbuckbunny", "carphone_pristine"])
def test_videos_of_one_scene_have_no_cut(name):
    assert probe.scan(videos.real_videos()[name], detector="builtin").cuts_s == ()


def test_a_flash_is_no_cut_and_neither_is_constant_motion():
    still, flash = [2.0] * 10, [90.0, 90.0]
    assert near_certain([*still, *flash, *still], [*still[:-1], 90.0, 2.0, 90.0, *still]) == []
    assert near_certain([40.0] * 20, [60.0] * 19) == []
    assert near_certain([*still, 90.0, *still], [*still[:-1], 90.0, 90.0, *still[:-1]]) == [11]
    assert near_certain([90.0], []) == [1]
