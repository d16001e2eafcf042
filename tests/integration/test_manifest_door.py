"""A manifest with many bad lines beside good ones, through `verify` and through stage one."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.property.test_manifest_lines import edited_rows
from tests.support import videos
from tests.support.clips import clip
from wanlora import ClipDataset
from wanlora.commands import cache_latents, verify
from wanlora.config import CacheLatentsConfig, VerifyConfig
from wanlora.data.clip_frames import load_clip
from wanlora.data.manifest_lines import line_of, parse_line
from wanlora.errors import MEDIA_ERROR_CODES, ManifestError, MediaError

SIZE = {"num_frames": 5, "height": 32, "width": 48}

EDITS = [
    {"transform": {"sample_aspect": value}} for value in ("abc", "0", "1/0", "1e99", [1], 10**400)
] + [
    {"start_s": float("nan")}, {"start_s": float("inf")}, {"start_s": 1e300}, {"start_s": 9e5},
    {"fps": 1e-9}, {"fps": 0.1}, {"fps": 10**400}, {"height": 16_000_000}, {"height": 16_000.0},
    {"height": 16_384, "width": 16_384}, {"num_frames": 10_001}, {"num_frames": 4},
    {"source": "a" * 5000}, {"source": "a/" * 3000}, {"source": "a" * 300}, {"source": "\0"},
    {"source": "\ud83d"}, {"source": "."}, {"source": "nowhere.mp4"}, {"warnings": 3},
    {"orig": {"width": {"deep": []}}}, {"prompt": "&nbsp;"}, {"kind": "images"}, {"kind": "npz"},
]  # fmt: skip


def own_line(number: int, path: Path, edit: dict) -> str:
    row = json.loads(line_of(clip(f"c{number}", source=str(path), path=path, **SIZE)))
    return json.dumps(row | edit)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A manifest of two good lines, one at each end, and the edited ones between them."""
    folder = tmp_path / "data"
    video = videos.write_video(folder / "walk.mp4", num_frames=20)
    lines = [
        own_line(n, video, edit) for n, edit in enumerate([{}, *EDITS, {"orig": {"width": "x"}}])
    ]
    lines[1:1] = ["{", "[" * 200_000, '{"source": ' + "9" * 5000 + "}"]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_verify_lists_every_bad_line_and_loads_the_others(data):
    page = data / "clips.html"
    result = verify.run(VerifyConfig(manifests=(data,), model="none/here", html=page))
    assert "c0" in page.read_text()
    assert [found.clip_id for found in result.loaded] == ["c0", f"c{len(EDITS) + 1}"]
    assert len(result.failed) == len(EDITS) + 3 == result.total - 2
    assert {failed.code for failed in result.failed} <= MEDIA_ERROR_CODES
    assert all(failed.message for failed in result.failed)
    assert not any(failed.message.startswith(failed.clip_id) for failed in result.failed)
    assert result.exit_code == 3


def test_stage_one_encodes_the_good_lines_and_lists_the_others(data, tmp_path, micro_home):
    result = cache_latents.run(
        CacheLatentsConfig(manifest=(data,), cache=tmp_path / "cache", model="micro", device="cpu")
    )
    assert (result.clips, result.clips_encoded, result.exit_code) == (2, 1, 3)  # equal bytes
    assert len(result.failures) == len(EDITS) + 3
    assert {failure.code for failure in result.failures} <= MEDIA_ERROR_CODES
    assert not any(failure.message.startswith(failure.clip_id) for failure in result.failures)


def test_a_data_set_leaves_bad_lines_out_with_a_warning(data, caplog):
    dataset = ClipDataset(data)
    bad = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(dataset) + len(bad) == len(EDITS) + 5
    assert dataset[0]["frames"].shape == (5, 3, 32, 48)
    with pytest.raises(MediaError, match="no such file"):
        dataset[[found.source for found in dataset.clips].index("nowhere.mp4")]


@given(row=edited_rows())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_an_edited_line_loads_or_gives_a_reason(row, tmp_path):
    folder = tmp_path / "data"
    if not folder.exists():
        videos.write_npz(folder / "a.npz", num_frames=17)
    try:
        found = parse_line(json.dumps(row).encode(), folder / "train.jsonl", "1")
        assert load_clip(found).shape[0] == found.num_frames
    except (ManifestError, MediaError) as error:
        reason = str(error)
    else:
        return
    assert reason
