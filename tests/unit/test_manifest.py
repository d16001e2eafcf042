"""Contract 1: what a manifest says, and what is refused."""

import json
import re
import tracemalloc
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import videos
from tests.support.clips import clip, write_manifest
from wanlora.data import manifest
from wanlora.data.clip import clip_key
from wanlora.data.manifest_lines import line_of
from wanlora.data.source_paths import written_path
from wanlora.errors import ManifestError


def write_lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bad_lines(path):
    bad = []
    manifest.read(path, on_bad=bad.append)
    return bad


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "data" / "processed" / "train.jsonl"
    path.parent.mkdir(parents=True)
    raw = tmp_path / "data" / "raw" / "walk.mp4"
    clips = [
        clip("a", path=raw),
        clip("b", path=raw, start_s=1 / 3, prompts=("one", "zwölf — 二"), warnings=("trimmed: x",)),
        clip("c", path=raw, kind="npz", source_sha256=None, orig={}, transform={}),
    ]
    write_manifest(path, clips)
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
        written = written_path(source, folder)
        monkeypatch.chdir(tmp_path)
        assert (folder / written).resolve() == source
        monkeypatch.chdir("/")
        assert (folder / written).resolve() == source
    assert written_path(tmp_path / "data" / "raw" / "b.mp4", folder) == "../raw/b.mp4"
    assert written_path(tmp_path / "far" / "c.mp4", folder) == "../../far/c.mp4"


def test_sources_outside_of_the_project_are_named_by_absolute_paths(tmp_path, monkeypatch):
    """Below the root or the home folder, and through links, which others may not follow."""
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    far, folder = tmp_path / "me" / "Videos" / "a.mp4", tmp_path / "me" / "work" / "data" / "p"
    assert written_path(far, folder) == str(far)
    assert written_path(Path("/videos/a.mp4"), Path("/data/p")) == "/videos/a.mp4"
    project = tmp_path / "project"
    (tmp_path / "disk").mkdir()
    project.mkdir()
    (project / "data").symlink_to(tmp_path / "disk")
    source = project / "videos" / "a.mp4"
    assert written_path(source, project / "data" / "p") == str(source)


def test_a_relative_manifest_path_gives_absolute_sources(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write_manifest(tmp_path / "data" / "train.jsonl", [clip(source="a.mp4")])
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
    assert [line.where for line in bad_lines(path)] == [f"{path}:2"]


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
def test_a_bad_line_is_listed_by_file_and_line_and_the_others_are_used(tmp_path, row, message):
    videos.write_npz(tmp_path / "good.npz")
    good = {"npz": "good.npz", "prompt": "x"}
    path = write_lines(tmp_path / "train.jsonl", good, row, good | {"clip_id": "b"})
    bad = []
    assert len(manifest.read(path, on_bad=bad.append)) == 2
    assert [line.where for line in bad] == [f"{path}:2"]
    assert bad[0].message.startswith(f"{path}:2: ")
    assert re.search(message, bad[0].message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": 0}, "fps 0; expected 0.1 to 1000"),
        ({"start_s": -1}, "start_s -1; expected 0 to 1e"),
        ({"start_s": 1e300}, "start_s"),
        ({"start_s": float("nan")}, "NaN"),
        ({"fps": float("inf")}, "Infinity"),
        ({"fps": 1e-9}, "fps"),
        ({"height": 16_000_000}, "height"),
        ({"num_frames": 10**4000}, "num_frames"),
        ({"num_frames": 17.0}, "num_frames is 17.0; expected int"),
        ({"transform": {"sample_aspect": "abc"}}, "sample_aspect"),
        ({"transform": {"sample_aspect": "0"}}, "sample_aspect"),
        ({"transform": {"sample_aspect": "1/0"}}, "sample_aspect"),
        ({"transform": {"sample_aspect": "1e999999999"}}, "sample_aspect"),
        ({"transform": {"sample_aspect": "1/9999"}}, "sample_aspect"),
        ({"transform": {"sample_aspect": [1, 1]}}, "sample_aspect"),
        ({"transform": {"resize": {"deep": {}}}}, "transform.resize"),
        ({"orig": {"width": []}}, "orig.width"),
        ({"warnings": 3}, "warnings is 3"),
        ({"source": "a" * 5000}, "4,096 bytes"),
        ({"source": "a\0.mp4"}, "NUL"),
        ({"source": " "}, "path is empty"),
        ({"source": "a\ud83d.mp4"}, "not valid Unicode"),
        ({"source_sha256": "\ud83d"}, r"source_sha256 .*U\+D83D"),
        ({"orig": {"codec": "h264\ud800"}}, r"orig\.codec .*U\+D800"),
        ({"orig": {"\ud800": 1}}, r"a key of orig .*U\+D800"),
        ({"transform": {"matrix": "\udfff"}}, r"transform\.matrix .*U\+DFFF"),
        ({"transform": {"\udfff": []}}, r"a key of transform .*U\+DFFF"),
        ({"clip_id": "a" * 5000}, "clip_id has 5,000 characters"),
        ({"prompt": "&nbsp; \u200b"}, "no caption"),
        ({"num_frames": "17"}, "num_frames is '17'; expected int"),
        ({"height": True}, "height is True"),
        ({"kind": "film"}, "expected one of video, npz, images"),
    ],
)
def test_an_edited_line_is_checked(tmp_path, changes, message):
    path = tmp_path / "train.jsonl"
    write_manifest(path, [clip()])
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
    write_manifest(tmp_path / "train.jsonl", [clip("a")])
    assert [c.clip_id for c in manifest.read_all([tmp_path])] == ["a"]
    write_manifest(tmp_path / "val.jsonl", [clip("b", split="val")])
    assert [c.split for c in manifest.read_all([tmp_path])] == ["train", "val"]


def test_a_clip_in_two_manifests_is_refused(tmp_path):
    write_manifest(tmp_path / "train.jsonl", [clip("a")])
    write_manifest(tmp_path / "val.jsonl", [clip("a")])
    with pytest.raises(ManifestError, match=r"clip a .*train\.jsonl .*val\.jsonl"):
        manifest.read_all([tmp_path])


def test_weights_are_read_back_and_written_only_when_not_1(tmp_path):
    path = tmp_path / "train.jsonl"
    write_manifest(path, [clip("a", weight=2.5), clip("b")])
    assert [c.weight for c in manifest.read(path)] == [2.5, 1.0]
    assert ["weight" in json.loads(line) for line in path.read_text().splitlines()] == [True, False]


def test_equal_lines_are_one_clip_whose_weight_is_their_sum(tmp_path):
    clips = [clip("a"), clip("b"), clip("a", weight=1.5), clip("a")]
    write_manifest(tmp_path / "train.jsonl", clips)
    found = manifest.read(tmp_path / "train.jsonl")
    assert [(c.clip_id, c.weight) for c in found] == [("a", 3.5), ("b", 1.0)]
    plain = write_lines(tmp_path / "plain.jsonl", *[{"npz": "x.npz", "prompt": "a"}] * 3)
    assert [c.weight for c in manifest.read(plain)] == [3.0]


def test_a_plain_line_has_a_weight_under_any_of_its_names(tmp_path):
    names = ["weight", "num_repeats", "repeats"]
    lines = [{"npz": f"{name}.npz", "prompt": "a", name: 4} for name in names]
    found = manifest.read(write_lines(tmp_path / "train.jsonl", *lines))
    assert [c.weight for c in found] == [4.0] * 3


@pytest.mark.parametrize("weight", [0, -1, "nan", "inf", 1e-9, 1e9, "much", [2]])
def test_a_weight_out_of_range_is_listed_with_the_clip(tmp_path, weight):
    path = tmp_path / "train.jsonl"
    write_manifest(path, [clip("good"), clip("heavy", weight=weight)])
    (bad,) = bad_lines(path)
    assert bad.where == f"{path}:2"
    assert "clip heavy: weight" in bad.message
    assert "0.001 to 1000" in bad.message


def test_the_second_line_of_a_clip_is_listed(tmp_path):
    path = tmp_path / "train.jsonl"
    write_manifest(path, [clip("a"), clip("a", prompts=("other",))])
    (bad,) = bad_lines(path)
    assert bad.where == f"{path}:2"
    assert "as a list" in bad.message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"npz": "a.npz", "prompt": "x"}\n'.encode("utf-16"), "UTF-16"),
        ('{"npz": "a.npz", "prompt": "größer"}\n'.encode("cp1252"), "Windows-1252"),
        (b"\0\0\0\x18ftypmp42\xff" + bytes(5000), "not text"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"npz": ' + b"9" * 5000 + b"}", "4300"),
        (b"x" * 3_000_000, "1,048,576 bytes"),
    ],
)
def test_a_file_without_one_usable_line_is_refused_with_the_reason(tmp_path, content, reason):
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(ManifestError, match=reason) as refusal:
        manifest.read(tmp_path / "train.jsonl")
    assert len(str(refusal.value)) < 1000


def test_half_an_emoji_in_a_caption_or_a_name_is_replaced(tmp_path):
    path = write_lines(
        tmp_path / "train.jsonl",
        {"npz": "a.npz", "prompt": "clap \ud83d", "activity": "\ud83d", "clip_id": "\ud83d\ude00"},
    )
    (found,) = manifest.read(path)
    assert (found.prompt, found.activity, found.clip_id) == ("clap \ufffd", "\ufffd", "😀")


def test_any_text_can_be_written(tmp_path):
    path = tmp_path / "train.jsonl"
    write_manifest(path, [clip("a", prompts=("clap \ud83d",))])
    assert manifest.read(path)[0].prompt == "clap \ufffd"


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("own", [True, False])
def test_the_spelling_of_a_name_may_differ(tmp_path, on_disk, own):
    name = unicodedata.normalize(on_disk, "sub/café.npz")
    file = videos.write_npz(tmp_path / name)
    written = unicodedata.normalize("NFD" if on_disk == "NFC" else "NFC", "sub\\café.npz")
    if own:
        write_manifest(tmp_path / "train.jsonl", [clip(source=written, kind="npz")])
    else:
        write_lines(tmp_path / "train.jsonl", {"npz": written, "prompt": "x"})
    assert manifest.read(tmp_path / "train.jsonl")[0].path == file


def test_the_key_changes_with_the_pixels_and_with_nothing_else():
    base = clip()
    key = clip_key(base, "ab" * 32)
    same = [
        {"clip_id": "other"}, {"prompts": ("new",)}, {"activity": "x"}, {"split": "val"},
        {"source": "elsewhere.mp4"}, {"path": Path("/x")}, {"orig": {}}, {"warnings": ("w",)},
        {"source_group": "g"}, {"source_sha256": None}, {"weight": 3.0},
    ]  # fmt: skip
    for changes in same:
        assert clip_key(replace(base, **changes), "ab" * 32) == key
    different = [
        {"start_s": 0.0625}, {"fps": 8.0}, {"num_frames": 21}, {"height": 48}, {"width": 64},
        {"transform": {**base.transform, "sample_aspect": "2"}},
    ]  # fmt: skip
    keys = {clip_key(replace(base, **changes), "ab" * 32) for changes in different}
    keys.add(clip_key(base, "cd" * 32))
    assert len(keys) == len(different) + 1
    assert key not in keys


@pytest.mark.parametrize(
    ("orig", "named"),
    [
        ({"width": 1920, "height": 1080}, 1),
        ({"width": 720, "height": 1280}, 1),
        ({"width": 720, "height": 576}, 0),
        ({"width": 576, "height": 720, "rotation": 270}, 0),
        ({"width": 1920, "height": 1080, "matrix": "bt709"}, 0),
        ({"width": "wide", "height": None}, 0),
        ({}, 0),
    ],
)
def test_old_lines_of_hd_videos_are_counted_with_the_command_that_corrects_them(
    caplog, orig, named
):
    manifest.warn_of_old_colours([clip(orig=orig), clip(kind="npz", orig=orig)])
    assert [record.args for record in caplog.records] == [(1,)] * named
    assert all("wanlora prepare" in record.getMessage() for record in caplog.records)


def test_memory_is_bounded_whatever_a_line_holds(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"npz": "' + b"a" * 40_000_000)
    tracemalloc.start()
    with pytest.raises(ManifestError, match="1,048,576 bytes"):
        manifest.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


def test_a_manifest_of_0_1_0_is_written_again_with_the_same_lines():
    path = Path(__file__).parents[1] / "fixtures" / "v0.1.0" / "data" / "val.jsonl"
    clips = manifest.read(path)
    assert {clip.weight for clip in clips} == {1.0}
    assert [line_of(clip) for clip in clips] == path.read_text().splitlines()
