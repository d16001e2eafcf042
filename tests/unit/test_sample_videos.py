"""Videos that exist already."""

import json

import pytest

from wanlora.commands.sample.videos import Video, missing, record_of
from wanlora.errors import ConfigError
from wanlora.media.recorded import record_path


def test_a_video_of_another_adapter_is_refused_with_the_field_that_differs(tmp_path):
    video = Video("a dog", 0, tmp_path / "a.mp4")
    made_with = {"adapters": [{"path": "run", "sha256": "a" * 64, "scale": 1.0}]}
    video.path.touch()
    record_path(video.path).write_text(json.dumps(record_of(video, made_with)))
    assert missing([video], made_with) == []
    later = {"adapters": [{"path": "run", "sha256": "b" * 64, "scale": 1.0}]}
    with pytest.raises(ConfigError, match=r"adapters\.0\.sha256: found a+\.*, wanted b"):
        missing([video], later)
    with pytest.raises(ConfigError, match=r"0\.sha256: found a+\.*, wanted <absent>"):
        missing([video], {"adapters": []})
