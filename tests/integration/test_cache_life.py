"""A cache over time: damaged and mended, added to and cleaned, through the real command line."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support import cli
from tests.support.caches import write_npz_clips
from tests.support.stores import (
    build_store,
    open_rows,
    row_of,
    segment_folders,
    segment_writer,
    write_rows,
)
from wanlora.commands import cache_latents
from wanlora.commands.cache_latents import cache_latents as stage
from wanlora.commands.cache_latents import plan
from wanlora.commands.inspect import run as inspect
from wanlora.config import CacheLatentsConfig, InspectConfig
from wanlora.core.buckets import Bucket
from wanlora.core.location import Url
from wanlora.errors import StoreError
from wanlora.store import wants
from wanlora.store.folder import Folder
from wanlora.store.index import committed
from wanlora.store.reader import StoreReader
from wanlora.store.views import read_view, write_view


def contents(cache: Path, name: str = "default") -> dict[str, bytes]:
    """Every row that the view names, by key."""
    view = read_view(cache, name)
    reader = StoreReader.of_view(cache, view)
    rows = {clip.key: reader.latents(clip.key).tobytes() for clip in view.clips}
    return rows | {key: reader.prompt_embeds(key).tobytes() for key in view.prompt_keys()}


def latents_in(cache: Path) -> set[str]:
    """Keys of all rows of latents, whether a view names them or not."""
    return set(committed(cache, "latents", read_view(cache, "default").fingerprint("latents")))


def shards(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".json")


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def copied(cache_fp16, npz_manifest, tmp_path) -> tuple[Path, Path]:
    """A cache of its own, and the manifest it was made from."""
    shutil.copytree(cache_fp16, tmp_path / "cache")
    return tmp_path / "cache", npz_manifest


def test_fast_verification_sees_sizes_and_full_sees_bits(copied):
    cache, _ = copied
    for level in ("fast", "full"):
        assert cli.invoke("inspect", cache, "--verify", level).exit_code == 0
    latents, text = (
        next(p for p in shards(cache / "store.zarr" / kind)) for kind in ("latents", "text")
    )
    data = bytearray(latents.read_bytes())
    data[len(data) // 2] ^= 1
    latents.write_bytes(data)
    fast = ("inspect", cache, "--verify", "fast", "--set", "statistics_clips=0")
    assert cli.invoke(*fast).exit_code == 0
    found = json.loads(cli.invoke("inspect", cache, "--verify", "--json").stdout)
    assert found["level"] == "full"
    assert len(found["invalid"]) == 1
    os.truncate(text, 10)
    result = cli.invoke(*fast)
    assert result.exit_code == 3
    assert "has 10 bytes, expected" in result.output
    text.unlink()
    assert "is missing" in cli.invoke(*fast).output


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "bit flipped": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_repair_encodes_only_the_bad_rows_again_and_the_content_is_as_before(copied, damage):
    cache, manifest = copied
    before = contents(cache)
    view = (cache / "views" / "default.jsonl").read_bytes()
    DAMAGES[damage](next(iter(shards(cache / "store.zarr" / "latents"))))
    result = cli.invoke("inspect", cache, "--repair", "--manifest", manifest, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    bad = found["repaired"]["dropped"]
    assert found["repaired"] == {"dropped": bad, "encoded": bad, "failures": []}
    assert 1 <= bad <= 6
    assert (found["invalid"], found["level"]) == ([], "full")
    assert contents(cache) == before
    assert (cache / "views" / "default.jsonl").read_bytes() == view


def test_repair_mends_a_damaged_commit_record_and_a_bad_prompt_at_once(copied):
    cache, manifest = copied
    before = contents(cache)
    os.truncate(next((cache / "store.zarr" / "latents").glob("*/*/*/zarr.json")), 30)
    flip(next(iter(shards(cache / "store.zarr" / "text"))))
    result = cli.invoke("inspect", cache, "--repair", "--manifest", manifest)
    assert result.exit_code == 0, result.output
    assert "rows dropped" in result.output
    assert contents(cache) == before


def test_repair_encodes_what_a_view_lost_whatever_else_the_manifests_name(copied, tmp_path):
    """A clip that cannot be used, a new one, and a view of some of the clips change nothing."""
    cache, manifest = copied
    view = read_view(cache, "default")
    write_view(cache, "a-few", replace(view, clips=view.clips[:2]))
    views = {path: path.read_bytes() for path in (cache / "views").iterdir()}
    before = contents(cache)
    more = shutil.copytree(manifest.parent, tmp_path / "data") / "train.jsonl"
    write_npz_clips(tmp_path / "more", num_clips=1, seed=9)
    shutil.copy(tmp_path / "more" / "clip-000.npz", more.parent / "new.npz")
    (more.parent / "bad.npz").write_text("not one")
    lines = [{"npz": f"{name}.npz", "prompt": "a new caption"} for name in ("new", "bad")]
    with more.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    shutil.rmtree(next((cache / "store.zarr" / "latents").glob("*/*/*/")))
    result = cli.invoke("inspect", cache, "--repair", "--manifest", more, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["repaired"]["failures"] == []
    assert contents(cache) == before
    assert {path: path.read_bytes() for path in (cache / "views").iterdir()} == views
    assert latents_in(cache) == {clip.key for clip in view.clips}


def test_repair_with_another_manifest_is_refused_and_says_why(copied, tmp_path):
    cache, _ = copied
    other = write_npz_clips(tmp_path / "other", num_clips=2, seed=5)
    flip(next(iter(shards(cache / "store.zarr" / "latents"))))
    result = cli.invoke("inspect", cache, "--repair", "--manifest", other)
    assert result.exit_code == 3
    text = " ".join(result.output.split())
    assert "--manifest and --device" in text
    assert "MISSING" in text


def test_gc_frees_what_no_view_names_and_keeps_what_one_does(tmp_path):
    view = build_store(tmp_path, num_clips=8, rows=4)
    write_rows(tmp_path, "latents", ["unnamed"])
    write_rows(tmp_path, "text", [view.prompt_keys()[0], "unnamed"])  # one repeated row
    kept = [clip for clip in view.clips if clip.clip_id != "clip-001"]
    write_view(tmp_path, "default", replace(view, clips=tuple(kept)))
    everything = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    now = InspectConfig(path=tmp_path, gc=True, gc_min_age_h=0)
    young = inspect(now.model_copy(update={"dry_run": True, "gc_min_age_h": 24.0}))
    assert (young.freed["rows"], young.freed["young"]) == (0, 3)
    assert "gc_min_age_h=0" in "\n".join(young.lines())
    planned = inspect(now.model_copy(update={"dry_run": True}))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == everything
    done = inspect(now)
    assert done.freed == planned.freed | {"dry_run": False}
    assert (done.freed["rows"], done.freed["repeats"]) == (3, 1)
    assert done.bytes < sum(len(data) for data in everything.values())
    assert set(open_rows(tmp_path, "latents").rows) == {clip.key for clip in kept}
    after = read_view(tmp_path, "default")
    reader = StoreReader.of_view(tmp_path, after)
    for clip in kept:
        assert np.array_equal(reader.latents(clip.key), row_of("latents", clip.key))
    for key in after.prompt_keys():
        assert np.array_equal(reader.prompt_embeds(key), row_of("text", key))
    again = inspect(now)
    assert (again.freed["rows"], again.freed["bytes"], again.freed["leftovers"]) == (0, 0, 0)


def test_a_run_that_was_stopped_is_listed_and_its_rows_are_kept_until_it_ends(
    copied, micro_home, monkeypatch
):  # fmt: skip
    cache, manifest = copied
    view = (cache / "views" / "default.jsonl").rename(cache / "aside")
    config = CacheLatentsConfig(
        manifest=(manifest,), cache=cache, model="micro", text_dtype="float32", view="mine"
    )
    seen = []

    def look(*arguments, original=plan.find_missing):
        seen.append(wants.names(cache))
        return original(*arguments)

    def stopped(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "find_missing", look)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "encode_missing", stopped)
        with pytest.raises(KeyboardInterrupt):
            cache_latents.run(config)
    (name,) = wants.names(cache)
    assert seen == [[name]]  # before it looks for missing rows
    found = inspect(InspectConfig(path=cache, gc=True, gc_min_age_h=0))
    assert [(row["name"], row["view"], row["missing"]) for row in found.wants] == [
        (name, "mine", 0)
    ]
    shown = "\n".join(found.lines())
    setting = re.search(r"--set '(gc_drop_wants=.*)'", shown)
    assert setting is not None
    view.rename(cache / "views" / "default.jsonl")
    planned = cli.invoke("inspect", cache, "--gc", "--dry-run", "--json", "--set", setting[1])
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["freed"]["wants"] == []
    assert (found.freed["rows"], found.freed["wants"]) == (0, [name])
    assert cache_latents.run(config).clips_encoded == 0
    assert wants.names(cache) == []
    assert len(contents(cache, "mine")) > 6


def test_gc_frees_old_generations_and_leftovers_but_nothing_fresh(tmp_path):
    build_store(tmp_path, num_clips=2)
    from wanlora.store.writer import SegmentWriter

    with SegmentWriter(
        tmp_path, kind="latents", provenance={"kind": "latents", "vae_sha256": "ff"},
        shape=(16, 5, 8, 8), dtype="float16", rows=4, max_bytes=2**20, max_seconds=100,
    ) as writer:  # fmt: skip
        writer.add("old", row_of("latents", "old"))
    (segment,) = segment_folders(tmp_path, "latents")
    orphan = segment.with_name("0" * 16)
    shutil.copytree(segment, orphan)
    (orphan / "zarr.json").unlink()
    partial = tmp_path / ".partial" / "left-by-a-kill"
    partial.write_bytes(b"half")
    fresh = inspect(InspectConfig(path=tmp_path, gc=True))
    assert (fresh.freed["leftovers"], len(fresh.fingerprints)) == (0, 3)
    for path in (partial, *(p for p in orphan.rglob("*") if p.is_file())):
        os.utime(path, (1, 1))
    before = num_bytes(tmp_path)
    done = inspect(InspectConfig(path=tmp_path, gc=True))
    assert done.freed["leftovers"] == 2
    assert done.freed["bytes"] == before - num_bytes(tmp_path) > 0
    assert not partial.exists()
    assert not orphan.exists()
    assert segment.exists()
    before = num_bytes(tmp_path)
    last = inspect(InspectConfig(path=tmp_path, gc=True, gc_min_age_h=0))
    assert last.freed["rows"] == 1
    assert last.freed["bytes"] == before - num_bytes(tmp_path) > 0
    assert [row["kind"] for row in last.fingerprints] == ["latents", "text"]


def test_gc_without_a_view_or_with_a_damaged_one_touches_nothing(tmp_path):
    build_store(tmp_path, num_clips=2)
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "views" / "default.jsonl").rename(tmp_path / "views" / "aside")
    with pytest.raises(StoreError, match=r"has no view.*wanlora cache-latents"):
        inspect(InspectConfig(path=tmp_path, gc=True, gc_min_age_h=0))
    (tmp_path / "views" / "aside").rename(tmp_path / "views" / "default.jsonl")
    (tmp_path / "views" / "other.jsonl").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        inspect(InspectConfig(path=tmp_path, gc=True, gc_min_age_h=0))
    (tmp_path / "views" / "other.jsonl").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_kill_while_compacting_leaves_every_kept_row(tmp_path, monkeypatch):
    """Stopped before each removal in turn: the rows to keep are always there."""
    view = build_store(tmp_path / "whole", num_clips=4, rows=4)
    clips = view.clips[1:]
    for point in range(4):
        cache = tmp_path / f"{point}"
        shutil.copytree(tmp_path / "whole", cache)
        write_view(cache, "default", replace(view, clips=clips))
        calls = []

        def stopping(self, key, *, original=Folder.remove, calls=calls, point=point):
            calls.append(key)
            if len(calls) > point:
                raise KeyboardInterrupt
            original(self, key)

        with monkeypatch.context() as patch:
            patch.setattr(Folder, "remove", stopping)
            try:
                inspect(InspectConfig(path=cache, gc=True, gc_min_age_h=0))
            except KeyboardInterrupt:
                assert len(calls) == point + 1
        reader = StoreReader.of_view(cache, read_view(cache, "default"))
        for clip in clips:
            assert np.array_equal(reader.latents(clip.key), row_of("latents", clip.key))
        done = inspect(InspectConfig(path=cache, gc=True, gc_min_age_h=0, verify="full"))
        assert done.invalid == []
        assert set(open_rows(cache, "latents").rows) == {clip.key for clip in clips}


def test_compaction_keeps_sources_and_the_projection_in_proportion(tmp_path):
    view = build_store(tmp_path, num_clips=1)
    gram, cross = np.eye(17), np.ones((17, 3))
    with segment_writer(tmp_path, "latents", bucket=Bucket(17, 64, 64)) as writer:
        for name in "abcd":
            row = row_of("latents", name)
            writer.add(name, row, source={"clip_id": name}, rgb=(gram, cross))
    named = tuple(replace(view.clips[0], clip_id=name, key=name) for name in "ac")
    write_view(tmp_path, "default", replace(view, clips=named))
    inspect(InspectConfig(path=tmp_path, gc=True, gc_min_age_h=0))
    reader = open_rows(tmp_path, "latents")
    assert set(reader.rows) == {"a", "c"}
    assert reader.source(reader.rows["c"]) == {"clip_id": "c"}
    store = StoreReader.of_view(tmp_path, read_view(tmp_path, "default"))
    np.testing.assert_allclose(store.latent_rgb()[0], 2 * gram)


def test_statistics_name_the_clip_that_stands_out(tmp_path):
    view = build_store(tmp_path, num_clips=12)
    with segment_writer(tmp_path, "latents") as writer:
        writer.add("odd", 3 * row_of("latents", "odd") + 1)
    clip = replace(view.clips[0], clip_id="the-odd-one", key="odd")
    write_view(tmp_path, "default", replace(view, clips=(*view.clips, clip)))
    result = inspect(InspectConfig(path=tmp_path))
    (found,) = (row["statistics"] for row in result.buckets)
    assert len(found["channel_mean"]) == 16
    assert all("the-odd-one" in line for line in found["outliers"])
    assert len(found["outliers"]) == 1
    assert "the-odd-one: mean +1.0" in "\n".join(result.lines())
    assert (
        inspect(InspectConfig(path=tmp_path, statistics_clips=0)).buckets[0]["statistics"][
            "outliers"
        ]
        == []
    )


def test_decode_writes_the_clip_beside_its_source_and_says_how_alike_they_are(
    cache_fp16, micro_folder, tmp_path
):  # fmt: skip
    from wanlora.media.decode import decode
    from wanlora.media.probe import scan

    view = read_view(cache_fp16, "default")
    one, two = view.clips[0].clip_id, view.clips[1].key[:8]
    result = cli.invoke("inspect", cache_fp16, "--decode", one, "--decode", two, "--json",
                        "--output-dir", tmp_path, "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["decoded"]
    assert [row["key"] for row in rows] == [view.clips[0].key, view.clips[1].key]
    for row in rows:
        assert 3 < row["psnr_db"] < 100
        info = scan(Path(row["video"])).info
        assert (info.width, info.height) == (96, 32)  # the source on the left
        assert len(decode(Path(row["video"]), start_s=0, fps=16, num_frames=9)) == 9
    assert "no view of" in cli.refuses("inspect", cache_fp16, "--decode", "nobody")


def test_a_decoded_clip_stays_in_its_folder(cache_fp16, micro_folder, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(cache_fp16, cache)
    view = read_view(cache, "default")
    write_view(cache, "default", replace(view, clips=(replace(view.clips[0], clip_id="../out"),)))
    result = cli.invoke("inspect", cache, "--decode", "../out", "--json",
                        "--output-dir", tmp_path / "decoded", "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.output
    video = Path(json.loads(result.stdout)["decoded"][0]["video"])
    assert video.resolve().parent == (tmp_path / "decoded").resolve()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "decoded"]


def test_contradictory_jobs_are_refused():
    assert "dry_run needs gc" in cli.refuses("inspect", "x", "--dry-run", exit_code=2)
    assert "repair and gc" in cli.refuses("inspect", "x", "--gc", "--repair", exit_code=2)
    assert "verify" in cli.refuses("inspect", "x", "--set", "verify=half", exit_code=2)


def test_a_cache_may_be_a_url_and_file_urls_are_folders(tmp_path):
    build_store(tmp_path, num_clips=2)
    assert inspect(InspectConfig(path=f"file://{tmp_path}")).clips == 2
    assert InspectConfig(path="s3://bucket/a/").path == Url("s3://bucket/a")
    assert InspectConfig(path="s3://bucket/a").model_dump(mode="json")["path"] == "s3://bucket/a"
    assert "names no bucket" in cli.refuses("inspect", "s3://", exit_code=2)
