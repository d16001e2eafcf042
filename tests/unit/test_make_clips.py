"""From a scan to the lines of a manifest."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from tests.support import videos
from tests.support.clips import clip
from wanlora.commands.prepare.check import Checked
from wanlora.commands.prepare.clip_files import file_name
from wanlora.commands.prepare.make import clips_of
from wanlora.commands.prepare.prepare import clip_rules
from wanlora.config import PrepareConfig
from wanlora.data.captions import Source
from wanlora.data.clip import clip_key
from wanlora.errors import MediaError
from wanlora.media import image, probe


def lines(path, content, **settings):
    config = PrepareConfig(**{"sources": [path], "height": 32, "width": 48, **settings})
    source = Source(
        path=path, prompts=("a person walks",), activity="walking", group=None, split=None
    )
    return clips_of(source, Checked("ab" * 32, content), clip_rules(config))


def warnings_of(clip):
    return {text.split(":")[0] for text in clip.warnings}


def test_repeated_frames_are_counted_for_each_clip(tmp_path):
    """The first 17 frames come evenly, then each stays for two periods, then one for 0.5 s."""
    times = [62.5 * k for k in range(18)]
    times += [times[-1] + 125 * k for k in range(1, 10)]
    times += [times[-1] + 500 + 62.5 * k for k in range(12)]
    times += [times[-1] + 20 * k for k in range(1, 60)]  # the mean rate is high enough
    path = videos.write_video(
        tmp_path / "a.mkv", num_frames=len(times), times_ms=[int(t) for t in times]
    )
    first, second, third, *_ = lines(path, probe.scan(path), num_frames=17)
    assert first.orig["repeated_frames"] == 0
    assert not warnings_of(first) & {"repeated", "gap"}
    assert second.orig["repeated_frames"] == 8
    assert warnings_of(second) & {"repeated", "gap"} == {"repeated"}
    assert warnings_of(third) & {"repeated", "gap"} == {"repeated", "gap"}
    assert any("8 frames" in text for text in third.warnings)


def test_a_share_of_repeats_below_a_tenth_is_no_warning(tmp_path):
    times = [int(62.5 * k) for k in range(9)] + [int(62.5 * k) for k in range(10, 25)]
    times += [times[-1] + 20 * k for k in range(1, 20)]
    path = videos.write_video(tmp_path / "a.mkv", num_frames=len(times), times_ms=times)
    [clip, *_] = lines(path, probe.scan(path), num_frames=17)
    assert clip.orig["repeated_frames"] == 1
    assert "repeated" not in warnings_of(clip)


def test_only_pixels_that_changed_change_the_key(tmp_path):
    """Large files without a matrix and coarse GIFs have one rule more than before."""
    old = {"resize": "bicubic-antialias", "crop": "center", "sample_aspect": "1"}
    found = {}
    for name, size in {"small.mkv": (96, 160), "large.mkv": (96, 1280)}.items():
        path = videos.write_video(tmp_path / name, fps=16, height=size[0], width=size[1])
        found[name] = lines(path, probe.scan(path), num_frames=17)[0]
    gif = videos.write_video(
        tmp_path / "a.gif", fps=16, codec="gif", pix_fmt="rgb8", b_frames=0, num_frames=17
    )
    found["gif"] = lines(gif, probe.scan(gif), num_frames=17)[0]
    assert found["small.mkv"].transform == old
    assert found["large.mkv"].transform == {**old, "matrix": "bt709"}
    assert found["gif"].transform == {**old, "timestamps": "rounded to 10 ms"}
    assert {clip.orig["matrix"] for clip in found.values()} == {"unspecified"}
    assert len({clip_key(clip, "ab" * 32) for clip in found.values()}) == 3


def test_a_picture_too_long_and_narrow_to_scale_is_refused(tmp_path):
    Image.fromarray(np.zeros((12_000, 1, 3), np.uint8)).save(tmp_path / "a.png")
    content = image.read_checked(tmp_path / "a.png")
    with pytest.raises(MediaError, match=r"a\.png.*1x12000.*89,478,485") as raised:
        lines(tmp_path / "a.png", content, height=480, width=832)
    assert raised.value.code == "bad_size"


def test_a_sample_aspect_that_makes_a_video_endless_is_refused(tmp_path):
    path = videos.write_video(tmp_path / "a.mp4")
    scan = probe.scan(path)
    narrow = replace(scan, info=replace(scan.info, sample_aspect=Fraction(1, 60_000)))
    with pytest.raises(MediaError, match=r"a\.mp4.*1/60000") as raised:
        lines(path, narrow, height=480, width=832)
    assert raised.value.code == "bad_size"


def test_a_file_of_frames_that_0_1_0_wrote_by_other_pixel_rules_is_not_taken_for_a_new_one():
    old = clip()
    assert file_name(old) == "walk-00000000-000000-17x32x48-16fps.npz"  # as 0.1.0 named it
    rules = [{}, {"matrix": "bt709"}, {"timestamps": "rounded to 10 ms"}]
    rules.append(rules[1] | rules[2])
    names = {file_name(replace(old, transform=old.transform | rule)) for rule in rules}
    assert len(names) == 4
