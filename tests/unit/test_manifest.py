"""Contract 1: what a manifest says, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import videos
from tests.support.clips import clip
from wanlora import manifest
from wanlora.errors import ManifestError


def write_lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "data" / "processed" / "train.jsonl"
    path.parent.mkdir(parents=True)
    raw = tmp_path / "data" / "raw" / "walk.mp4"
    clips = [
        clip("a", path=raw),
        clip("b", path=raw, start_s=1 / 3, prompts=("one", "zwölf — 二"), warnings=("trimmed: x",)),
        clip("c", path=raw, kind="npz", source_sha256=None, orig={}, transform={}),
    ]
    manifest.write(path, clips)
    assert manifest.read(path) == clips
    assert [p.name for p in path.parent.iterdir()] == ["train.jsonl"]


def test_a_manifest_stays_valid_when_the_working_directory_changes(tmp_path, monkeypatch):
    tmp_path = tmp_path.resolve()
    folder = tmp_path / "data" / "processed"
    for source in (
        folder / "a.mp4",
        tmp_path / "data" / "raw" / "b.mp4",
        tmp_path / "far" / "c.mp4",
    ):
        written = manifest.written_path(source, folder)
        monkeypatch.chdir(tmp_path)
        assert (folder / written).resolve() == source
        monkeypatch.chdir("/")
        assert (folder / written).resolve() == source
    assert manifest.written_path(tmp_path / "data" / "raw" / "b.mp4", folder) == "../raw/b.mp4"
    assert manifest.written_path(tmp_path / "far" / "c.mp4", folder) == f"{tmp_path}/far/c.mp4"


def test_a_relative_manifest_path_gives_absolute_sources(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    manifest.write(tmp_path / "data" / "train.jsonl", [clip(source="a.mp4")])
    monkeypatch.chdir(tmp_path)
    assert manifest.read(Path("data/train.jsonl"))[0].path == tmp_path / "data" / "a.mp4"


def test_plain_npz_lines_get_their_size_from_the_file(tmp_path):
    videos.write_npz(tmp_path / "processed" / "clap" / "p01.npz", num_frames=21)
    path = write_lines(
        tmp_path / "processed" / "train.jsonl",
        {"npz": "clap/p01.npz", "prompt": "a person claps"},
    )
    (found,) = manifest.read(path)
    assert found.bucket == (21, 32, 48)
    assert (found.kind, found.start_s, found.fps) == ("npz", 0.0, 16.0)
    assert (found.prompt, found.activity, found.split) == ("a person claps", "clap", "train")
    assert found.source_sha256 is None
    assert found.clip_id.startswith("p01-")


@pytest.mark.parametrize("prefix", ["", "processed/", "data/processed/"])
def test_plain_paths_may_start_at_a_folder_above(tmp_path, prefix):
    folder = tmp_path / "data" / "processed"
    videos.write_npz(folder / "clips" / "a.npz")
    path = write_lines(folder / "train.jsonl", {"path": f"{prefix}clips/a.npz", "caption": "x"})
    assert manifest.read(path)[0].path == folder / "clips" / "a.npz"


def test_one_bad_npz_does_not_hide_the_others(tmp_path):
    videos.write_npz(tmp_path / "good.npz")
    (tmp_path / "text.npz").write_text("no")
    path = write_lines(
        tmp_path / "train.jsonl",
        *({"npz": name, "text": "x"} for name in ("good.npz", "text.npz", "missing.npz")),
    )
    sizes = [clip.bucket for clip in manifest.read(path)]
    assert sizes == [(17, 32, 48), (0, 0, 0), (0, 0, 0)]


def test_a_plain_line_may_say_its_split_and_else_the_name_of_the_manifest_does(tmp_path):
    for name in "abc":
        videos.write_npz(tmp_path / f"{name}.npz")
    lines = [{"npz": f"{name}.npz", "prompt": "x"} for name in "abc"]
    said = [lines[0] | {"split": "validation"}, lines[1] | {"split": "train"}, lines[2]]
    for name, last in (("train", "train"), ("clips", "train"), ("val", "val"), ("test", "val")):
        path = write_lines(tmp_path / f"{name}.jsonl", *said)
        assert [clip.split for clip in manifest.read(path)] == ["val", "train", last]
    path = write_lines(tmp_path / "train.jsonl", lines[0], lines[1] | {"split": "later"})
    with pytest.raises(ManifestError, match=r"train\.jsonl:2: split 'later'; expected one of"):
        manifest.read(path)


def test_several_captions_are_a_list(tmp_path):
    videos.write_npz(tmp_path / "a.npz")
    path = write_lines(tmp_path / "train.jsonl", {"clip": "a.npz", "caption": ["one", "two", " "]})
    assert manifest.read(path)[0].prompts == ("one", "two")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"npz": "a.npz", "path": "b.npz", "prompt": "x"}, r"path and npz .*disagree"),
        ({"npz": "a.npz", "prompt": "x", "text": "y"}, r"prompt and text .*disagree: 'x'.*'y'"),
        ({"npz": "a.npz"}, "no caption; expected text under one of prompt, caption"),
        ({"prompt": "x"}, "no path; expected one of video, .*found prompt"),
        ({"video": "a.mp4", "prompt": "x"}, "wanlora prepare VIDEOS --captions"),
        ({"npz": "a.npz", "prompt": 3}, "caption is 3; expected text"),
        (["a.npz", "x"], "expected an object"),
        ({"source": "a.mp4", "kind": "video", "prompt": "x"}, "no clip_id"),
    ],
)
def test_a_bad_line_is_refused_by_file_and_line(tmp_path, row, message):
    videos.write_npz(tmp_path / "good.npz")
    path = write_lines(tmp_path / "train.jsonl", {"npz": "good.npz", "prompt": "x"}, row)
    with pytest.raises(ManifestError, match=message) as raised:
        manifest.read(path)
    assert f"{path}:2" in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": 0}, "fps > 0"),
        ({"start_s": -1}, "start_s >= 0"),
        ({"num_frames": "17"}, "num_frames is '17'; expected int"),
        ({"height": True}, "height is True"),
        ({"kind": "film"}, "expected one of video, npz, images"),
    ],
)
def test_an_edited_line_is_checked(tmp_path, changes, message):
    path = tmp_path / "train.jsonl"
    manifest.write(path, [clip()])
    write_lines(path, json.loads(path.read_text()) | changes)
    with pytest.raises(ManifestError, match=message):
        manifest.read(path)


def test_missing_empty_and_broken_manifests_are_refused(tmp_path):
    with pytest.raises(ManifestError, match="wanlora prepare"):
        manifest.read(tmp_path / "train.jsonl")
    (tmp_path / "train.jsonl").write_text("\n\n")
    with pytest.raises(ManifestError, match="holds no clip"):
        manifest.read(tmp_path / "train.jsonl")
    (tmp_path / "train.jsonl").write_text('{"npz": "a.npz", ')
    with pytest.raises(ManifestError, match=r"train\.jsonl:1: not JSON"):
        manifest.read(tmp_path / "train.jsonl")


def test_a_folder_stands_for_both_splits(tmp_path):
    manifest.write(tmp_path / "train.jsonl", [clip("a")])
    assert [c.clip_id for c in manifest.read_all([tmp_path])] == ["a"]
    manifest.write(tmp_path / "val.jsonl", [clip("b", split="val")])
    assert [c.split for c in manifest.read_all([tmp_path])] == ["train", "val"]


def test_a_clip_in_two_manifests_is_refused(tmp_path):
    manifest.write(tmp_path / "train.jsonl", [clip("a")])
    manifest.write(tmp_path / "val.jsonl", [clip("a")])
    with pytest.raises(ManifestError, match=r"clip a stands in .*train\.jsonl and in .*val\.jsonl"):
        manifest.read_all([tmp_path])


def test_a_clip_twice_in_one_manifest_is_refused(tmp_path):
    manifest.write(tmp_path / "train.jsonl", [clip("a"), clip("a", prompts=("other",))])
    with pytest.raises(ManifestError, match=r"train\.jsonl:2: clip a .*as a list"):
        manifest.read(tmp_path / "train.jsonl")


def test_weights_are_read_back_and_written_only_when_not_1(tmp_path):
    path = tmp_path / "train.jsonl"
    manifest.write(path, [clip("a", weight=2.5), clip("b")])
    assert [c.weight for c in manifest.read(path)] == [2.5, 1.0]
    assert ["weight" in json.loads(line) for line in path.read_text().splitlines()] == [True, False]


def test_equal_lines_are_one_clip_whose_weight_is_their_sum(tmp_path):
    clips = [clip("a"), clip("b"), clip("a", weight=1.5), clip("a")]
    manifest.write(tmp_path / "train.jsonl", clips)
    found = manifest.read(tmp_path / "train.jsonl")
    assert [(c.clip_id, c.weight) for c in found] == [("a", 3.5), ("b", 1.0)]
    plain = write_lines(tmp_path / "plain.jsonl", *[{"npz": "x.npz", "prompt": "a"}] * 3)
    assert [c.weight for c in manifest.read(plain)] == [3.0]


def test_a_plain_line_has_a_weight_under_any_of_its_names(tmp_path):
    names = ["weight", "num_repeats", "repeats"]
    lines = [{"npz": f"{name}.npz", "prompt": "a", name: 4} for name in names]
    found = manifest.read(write_lines(tmp_path / "train.jsonl", *lines))
    assert [c.weight for c in found] == [4.0] * 3


@pytest.mark.parametrize(
    "weight", [0, -1, float("nan"), float("inf"), 1e-9, 1e9, "much", [2], True]
)
def test_a_weight_out_of_range_is_refused_with_the_clip(tmp_path, weight):
    manifest.write(tmp_path / "train.jsonl", [clip("good"), clip("heavy", weight=weight)])
    with pytest.raises(ManifestError, match=r"train\.jsonl:2: clip heavy: weight .*1000"):
        manifest.read(tmp_path / "train.jsonl")


def test_the_key_changes_with_the_pixels_and_with_nothing_else():
    base = clip()
    key = manifest.clip_key(base, "ab" * 32)
    same = [
        {"clip_id": "other"}, {"prompts": ("new",)}, {"activity": "x"}, {"split": "val"},
        {"source": "elsewhere.mp4"}, {"path": Path("/x")}, {"orig": {}}, {"warnings": ("w",)},
        {"source_group": "g"}, {"source_sha256": None}, {"weight": 3.0},
    ]  # fmt: skip
    for changes in same:
        assert manifest.clip_key(replace(base, **changes), "ab" * 32) == key
    different = [
        {"start_s": 0.0625}, {"fps": 8.0}, {"num_frames": 21}, {"height": 48}, {"width": 64},
        {"transform": {**base.transform, "sample_aspect": "2"}},
    ]  # fmt: skip
    keys = {manifest.clip_key(replace(base, **changes), "ab" * 32) for changes in different}
    keys.add(manifest.clip_key(base, "cd" * 32))
    assert len(keys) == len(different) + 1
    assert key not in keys
