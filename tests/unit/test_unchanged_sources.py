"""Pixels that are stored come from the bytes that the clip's key was made from."""

import errno
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.clips import clip
from wanlora.commands.prepare.check import check
from wanlora.commands.prepare.materialize import materialize
from wanlora.data import clip_frames
from wanlora.data.clip import Clip
from wanlora.errors import MediaError, PassingError
from wanlora.files import is_lfs_pointer
from wanlora.media import source

VIDEOS = Path(__file__).parent.parent / "fixtures" / "v0.1.0" / "videos"


def replaced(path: Path, other: Path) -> None:
    """Put another file in place of one, as an export does."""
    shutil.copy(other, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@pytest.fixture
def video(tmp_path: Path) -> Clip:
    path = tmp_path / "a.mp4"
    shutil.copy(VIDEOS / "moving" / "m0.mp4", path)
    return clip(path=path, width=96, height=64, source_sha256=source.source_sha256(path))


@pytest.fixture
def npz(tmp_path: Path) -> Clip:
    for seed, name in enumerate(("a", "b")):
        frames = np.random.default_rng(seed).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", frames=frames)
    path = tmp_path / "a.npz"
    return clip(
        path=path, kind="npz", num_frames=5, width=32, height=32, transform={},
        source_sha256=source.source_sha256(path),
    )  # fmt: skip


def known_of(made: Clip) -> source.SourceHashes:
    known: source.SourceHashes = {}
    source.source_sha256(made.path, known)
    return known


@pytest.mark.parametrize("kind", ["video", "npz"])
def test_a_source_replaced_after_it_was_hashed_is_changed(request, kind):
    made = request.getfixturevalue(kind)
    known = known_of(made)
    clip_frames.load_unchanged(made, known)
    other = VIDEOS / "still" / "s0.mp4" if kind == "video" else made.path.with_name("b.npz")
    replaced(made.path, other)
    with pytest.raises(PassingError) as caught:
        clip_frames.load_unchanged(made, known)
    assert caught.value.code == "changed"


def test_a_source_replaced_while_it_is_decoded_is_changed(video, monkeypatch):
    known, load = known_of(video), clip_frames._load

    def slow(made: Clip, num_frames: int) -> object:
        pixels = load(made, num_frames)
        replaced(made.path, VIDEOS / "still" / "s0.mp4")
        return pixels

    monkeypatch.setattr(clip_frames, "_load", slow)
    with pytest.raises(PassingError) as caught:
        clip_frames.load_unchanged(video, known)
    assert caught.value.code == "changed"
    shutil.copy(VIDEOS / "moving" / "m0.mp4", video.path)
    without_hash = replace(video, source_sha256=None)  # as verify loads it
    with pytest.raises(PassingError):
        clip_frames.load_unchanged(without_hash, {})


def test_an_npz_is_hashed_as_it_is_decoded_even_if_size_and_time_are_the_same(npz):
    known = known_of(npz)
    stat = npz.path.stat()
    replaced(npz.path, npz.path.with_name("b.npz"))
    os.utime(npz.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert npz.path.stat().st_size == stat.st_size
    with pytest.raises(PassingError) as caught:
        clip_frames.load_unchanged(npz, known)
    assert caught.value.code == "changed"


@pytest.mark.parametrize("kind", ["video", "npz"])
def test_equal_bytes_with_another_time_are_the_same_source(request, kind):
    made = request.getfixturevalue(kind)
    known = known_of(made)
    os.utime(made.path, ns=(1, 1))  # copied to another machine
    assert clip_frames.load_unchanged(made, known).shape[0] == made.num_frames


def test_a_file_that_changes_while_it_is_hashed_has_no_hash(video):
    known: source.SourceHashes = {}
    with pytest.raises(PassingError) as caught:
        source.source_sha256(video.path, known, alive=lambda: os.utime(video.path, ns=(1, 1)))
    assert (caught.value.code, known) == ("changed", {})


def test_prepare_does_not_keep_what_it_found_in_a_file_that_changed(video, monkeypatch):
    def scanning(path: Path, **_: object) -> object:
        os.utime(path, ns=(1, 1))
        return None

    monkeypatch.setattr("wanlora.media.probe.scan", scanning)
    outcome = check(video.path, lambda: None, detector="builtin")
    assert isinstance(outcome, PassingError)  # which the journal does not remember
    assert outcome.code == "changed"


def test_a_clip_is_not_materialized_from_another_source(video, tmp_path):
    known = known_of(video)
    made, failed = materialize([video], tmp_path / "out", known, step=lambda: None)
    assert (len(made), failed) == (1, [])
    assert known[str(made[0].path)][2] == made[0].source_sha256
    made[0].path.unlink()
    replaced(video.path, VIDEOS / "still" / "s0.mp4")
    made, failed = materialize([video], tmp_path / "out", known, step=lambda: None)
    assert (made, [error.code for _, error in failed]) == ([], ["changed"])


def test_known_sources_are_not_read_and_the_others_are_counted(tmp_path):
    paths = [tmp_path / f"{i}.bin" for i in range(6)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 1000)
    known: source.SourceHashes = {}
    steps: list[int] = []
    hashed, num_bytes = source.hash_all(paths, known, threads=3, step=lambda: steps.append(1))
    assert (num_bytes, len(steps)) == (6000, 6)
    assert hashed == {path: source.source_sha256(path) for path in paths}
    os.utime(paths[0], ns=(1, 1))
    paths[1].unlink()
    again, num_bytes = source.hash_all(paths, known, threads=3, step=lambda: None)
    assert num_bytes == 1000
    assert isinstance(again.pop(paths[1]), MediaError)
    assert again == {path: digest for path, digest in hashed.items() if path != paths[1]}


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_an_error_of_the_file_system_is_passing(video, monkeypatch, number):
    def failing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "stat", failing)
    with pytest.raises(PassingError) as caught:
        source.source_sha256(video.path)
    assert caught.value.code == "unreadable"


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    pipe = tmp_path / "a.mp4"
    os.mkfifo(pipe)
    assert not is_lfs_pointer(pipe)
    with pytest.raises(MediaError, match=re.escape(str(pipe))) as raised:
        source.source_sha256(pipe)
    assert raised.value.code == "unreadable"
