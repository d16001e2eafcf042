"""Loading clips as stage one will, and listing what it would leave out."""

import dataclasses
import json
import re

import pytest

from tests.support import videos
from wanlora.commands import verify
from wanlora.config import VerifyConfig
from wanlora.errors import ManifestError


def write_manifest(folder, *names, file="train.jsonl"):
    lines = [json.dumps({"npz": name, "prompt": f"caption of {name}"}) for name in names]
    (folder / file).write_text("\n".join(lines) + "\n")
    return folder / file


def test_clips_are_shown_with_shape_range_and_prompt(tmp_path):
    videos.write_npz(tmp_path / "a.npz")
    result = verify.run(VerifyConfig(manifests=(write_manifest(tmp_path, "a.npz"),)))
    text = "\n".join(result.lines())
    assert "[1, 17, 3, 32, 48]  [-1.00, 1.00]  'caption of a.npz'" in text
    assert re.search(r"\b1 of 1 clip .*\(17x32x48 1\)", text)
    assert f"next: wanlora cache-latents --manifest {tmp_path / 'train.jsonl'}" in text
    assert result.exit_code == 0


def test_a_full_size_clip_has_the_documented_shape(tmp_path):
    videos.write_npz(tmp_path / "a.npz", num_frames=81, height=480, width=832)
    result = verify.run(VerifyConfig(manifests=(write_manifest(tmp_path, "a.npz"),)))
    assert "[1, 81, 3, 480, 832]" in result.lines()[0]


def test_every_clip_that_would_be_left_out_is_listed_with_its_reason(tmp_path):
    videos.write_npz(tmp_path / "good.npz")
    videos.write_npz(tmp_path / "eighty.npz", num_frames=80)
    videos.write_npz(tmp_path / "floats.npz", dtype=float)
    videos.write_npz(tmp_path / "odd.npz", width=40)
    names = ("eighty.npz", "floats.npz", "gone.npz", "good.npz", "odd.npz")
    result = verify.run(VerifyConfig(manifests=(write_manifest(tmp_path, *names),)))
    assert {clip.source: clip.code for clip in result.failed} == {
        "eighty.npz": "bad_size",
        "floats.npz": "bad_npz",
        "gone.npz": "missing",
        "odd.npz": "bad_size",
    }
    assert result.exit_code == 3
    text = "\n".join(result.lines())
    assert "80 frames; expected 4k+1" in text
    assert "1 of 5 clips" in text
    assert "4 clips: bad_npz 1, bad_size 2, missing 1" in text
    assert "next:" not in text


def test_limit_counts_for_each_manifest_and_says_what_was_not_tried(tmp_path):
    for name in ("a", "b", "c"):
        videos.write_npz(tmp_path / f"{name}.npz")
    paths = (
        write_manifest(tmp_path, "a.npz", "b.npz"),
        write_manifest(tmp_path, "c.npz", file="val.jsonl"),
    )
    result = verify.run(VerifyConfig(manifests=paths, limit=1))
    assert [clip.clip_id[0] for clip in result.loaded] == ["a", "c"]
    assert "not tried: 1 clip (--limit)" in result.lines()


def test_the_result_is_json(tmp_path):
    videos.write_npz(tmp_path / "a.npz")
    result = verify.run(VerifyConfig(manifests=(write_manifest(tmp_path, "a.npz", "no.npz"),)))
    loaded = json.loads(json.dumps(dataclasses.asdict(result)))
    assert loaded["loaded"][0]["shape"] == [1, 17, 3, 32, 48]
    assert loaded["failed"][0]["code"] == "missing"


def test_a_missing_manifest_is_refused_with_the_command_that_makes_one(tmp_path):
    with pytest.raises(ManifestError, match="wanlora prepare"):
        verify.run(VerifyConfig(manifests=(tmp_path,)))
