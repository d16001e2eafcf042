"""Sources that are looked up under another folder."""

from pathlib import Path

import pytest

from tests.support import videos
from tests.support.clips import clip
from wanlora.data.source_paths import source_path
from wanlora.data.source_root import advice, find_sources, parts_of
from wanlora.errors import ManifestError


def _clips(*written: str):
    folder = Path("/nowhere/data/processed")
    return [
        clip(f"c{n}", source=text, path=source_path(text, folder)) for n, text in enumerate(written)
    ]


def _found(clips, *roots):
    return [each.path for each in find_sources(clips, roots).clips]


def _touch(*paths: Path) -> list[Path]:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return list(paths)


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        ("/home/me/v/a.mp4", ("home", "me", "v", "a.mp4")),
        ("../../v/a.mp4", ("v", "a.mp4")),
        ("C:\\Users\\me\\a b.mp4", ("Users", "me", "a b.mp4")),
        ("c:/v/a.mp4", ("v", "a.mp4")),
        ("\\\\server\\share\\v\\a.mp4", ("v", "a.mp4")),
        ("..\\v\\a.mp4", ("v", "a.mp4")),
    ],
)
def test_parts_of_paths_of_all_systems(written, parts):
    assert parts_of(written) == parts


def test_equal_names_in_different_folders_are_not_confused(tmp_path):
    there = _touch(*(tmp_path / kind / f"{n}.mp4" for kind in ("walk", "sit") for n in range(2)))
    _touch(tmp_path / "0.mp4", tmp_path / "1.mp4")  # of something else
    clips = _clips(*(f"/x/y/{path.relative_to(tmp_path)}" for path in there))
    assert _found(clips, tmp_path) == there


def test_two_sources_are_never_the_same_file(tmp_path):
    _touch(tmp_path / "0.mp4")
    clips = _clips("/x/walk/0.mp4", "/x/sit/0.mp4")
    assert _found(clips, tmp_path) == [each.path for each in clips]


def test_sources_of_several_folders_and_depths(tmp_path):
    first = _touch(tmp_path / "one" / "a.mp4", tmp_path / "one" / "b.mp4")
    second = _touch(tmp_path / "two" / "deep" / "c.mp4")
    here = _touch(tmp_path / "here.mp4")
    clips = _clips("D:\\a.mp4", "D:\\b.mp4", "/mnt/x/deep/c.mp4", str(here[0]), "/mnt/gone.mp4")
    found = find_sources(clips, (tmp_path / "one", tmp_path / "two"))
    assert [each.path for each in found.clips] == [*first, *second, *here, clips[4].path]
    assert found.moved == {
        old.path: new for old, new in zip(clips, [*first, *second], strict=False)
    }
    assert find_sources(clips, ()).clips == clips


def test_a_plain_clip_gets_its_size_from_the_file_that_is_found(tmp_path):
    videos.write_npz(tmp_path / "a.npz", num_frames=21)
    (plain,) = _clips("E:\\clips\\a.npz")
    plain = clip(source=plain.source, path=plain.path, kind="npz", num_frames=0, height=0, width=0)
    assert find_sources([plain], [tmp_path]).clips[0].bucket == (21, 32, 48)


def test_a_root_that_is_not_a_folder_is_refused(tmp_path):
    with pytest.raises(ManifestError, match=r"--source-root .*gone: expected a folder"):
        find_sources(_clips("a.mp4"), [tmp_path / "gone"])


def test_advice_counts_sources_once():
    text = advice(["C:\\a.mp4", "C:\\a.mp4", "C:\\b.mp4"], 9, [])
    assert "2 of 9" in text
    assert "C:\\a.mp4" in text
    assert advice([], 9, []) == ""
