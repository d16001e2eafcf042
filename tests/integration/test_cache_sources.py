"""Sources that stage one need not read again, and sources that it cannot read for a moment."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from wanlora.commands import cache_latents, prepare
from wanlora.commands.cache_latents import encode_settings, preflight
from wanlora.commands.cache_latents.clip_keys import Failure
from wanlora.commands.cache_latents.find_encoders import find_encoders
from wanlora.commands.cache_latents.hashes import Hashes
from wanlora.commands.cache_latents.plan import find_missing, make_plan
from wanlora.commands.cache_latents.sources import require_videos
from wanlora.config import CacheLatentsConfig, PrepareConfig
from wanlora.errors import ManifestError
from wanlora.processes.ranks import ALONE, Rank
from wanlora.store.views import read_view

FIXTURE = Path(__file__).parent.parent / "fixtures" / "v0.1.0"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Videos, manifests, and a cache that has all of their rows: nothing is encoded here."""
    return Path(shutil.copytree(FIXTURE, tmp_path / "old"))


@pytest.fixture
def config(old: Path, micro_home: Path) -> CacheLatentsConfig:
    return CacheLatentsConfig(
        manifest=(old / "data",), cache=old / "cache", model="micro", device="cpu"
    )


def total_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.mp4"))


def test_stage_one_reads_only_sources_that_prepare_has_not_hashed(old, config):
    videos, data = old / "videos", old / "new"
    prepare.run(PrepareConfig(
        sources=(videos,), output=data, num_frames=17, height=64, width=96, workers=1,
    ))  # fmt: skip
    assert set(json.loads((data / "sources.json").read_text())) == {
        os.path.relpath(path, data) for path in videos.rglob("*.mp4")
    }
    new = config.model_copy(update={"manifest": (data,), "dry_run": True})
    result = cache_latents.run(new)
    assert (result.bytes_hashed, result.clips_encoded, result.clips) == (0, 0, 6)
    [touched] = videos.rglob("m1.mp4")
    os.utime(touched, ns=(1, 1))
    assert cache_latents.run(new).bytes_hashed == touched.stat().st_size
    moved = Path(shutil.copytree(old, old.parent / "moved"))  # with the times of the files
    new = new.model_copy(update={"manifest": (moved / "new",)})
    assert cache_latents.run(new).bytes_hashed == touched.stat().st_size
    (moved / "new" / "sources.json").write_text("{")
    assert cache_latents.run(new).bytes_hashed == total_bytes(videos)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_clip_whose_source_cannot_be_read_for_a_moment_stays(config, monkeypatch, number):
    before = read_view(config.cache, "default")
    stat = Path.stat

    def failing(path: Path, **options: bool) -> os.stat_result:
        if path.name == "m0.mp4":
            raise OSError(number, os.strerror(number), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", failing)
    result = cache_latents.run(config)
    assert ([f.code for f in result.unread], result.failures) == (["unreadable"], [])
    assert (result.exit_code, result.clips, result.clips_encoded) == (0, 6, 0)
    assert read_view(config.cache, "default").clips == before.clips


def test_a_clip_that_fails_stays_in_the_view_until_its_line_is_deleted(old, config):
    before = read_view(config.cache, "default")
    path = old / "data" / "val.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["num_frames"] = 18
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = cache_latents.run(config)
    assert [f.clip_id for f in result.kept] == [lines[0]["clip_id"]]
    assert (result.exit_code, result.clips, result.failures) == (3, 6, [])
    assert read_view(config.cache, "default").clips == before.clips
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    result = cache_latents.run(config)
    assert (result.exit_code, result.clips, result.kept) == (0, 5, [])


@pytest.mark.parametrize("code", ["missing", "unreadable"])
def test_a_rank_that_cannot_read_a_video_publishes_no_smaller_view(code):
    with pytest.raises(ManifestError, match=r"a\.mp4"):
        require_videos([Failure(code, "a", "a.mp4")], Rank(1, 2))
    require_videos([Failure(code, "a", "a.mp4")], ALONE)
    require_videos([Failure("bad_size", "a", "a.mp4")], Rank(1, 2))


def test_a_rank_without_a_video_whose_row_is_missing_publishes_no_view(old, config, monkeypatch):
    """The manifest has its hash, so it counts as unread until the store turns out to lack it."""
    [gone] = (old / "videos").rglob("m1.mp4")
    gone.unlink()
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert [f.code for f in cache_latents.run(config).unread] == ["missing"]
    shutil.rmtree(old / "cache" / "store.zarr" / "latents")
    before = (old / "cache" / "views" / "default.jsonl").read_bytes()
    with pytest.raises(ManifestError, match=r"m1\.mp4"):
        cache_latents.run(config)
    assert (old / "cache" / "views" / "default.jsonl").read_bytes() == before


@pytest.mark.parametrize("gone", ["m1.mp4", "copy.mp4"])
def test_of_two_clips_with_equal_pixels_the_one_that_can_be_read_is_encoded(old, config, gone):
    [video] = (old / "videos").rglob("m1.mp4")
    shutil.copy2(video, video.with_name("copy.mp4"))
    path = old / "data" / "val.jsonl"
    [line] = [line for line in path.read_text().splitlines() if "m1.mp4" in line]
    copy = json.loads(line)
    copy |= {"clip_id": "copy", "source": copy["source"].replace("m1", "copy")}
    path.write_text(f"{line}\n{json.dumps(copy)}\n")
    new = config.model_copy(update={"manifest": (path,), "cache": old / "new"})
    video.with_name(gone).unlink()
    found, _ = preflight.check(new)
    hashes = Hashes.read(new.cache, new.manifest)
    encoders = find_encoders(encode_settings.of_config(new), hashes)
    plan = make_plan(found, cache=new.cache, encoders=encoders, hashes=hashes, threads=1)
    plan = find_missing(new.cache, plan)
    assert len(plan.clips) == 2
    [missing] = plan.missing_clips["latents"]
    assert missing.clip.path.exists()
