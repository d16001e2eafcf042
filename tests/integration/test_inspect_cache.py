import json
import os
from dataclasses import asdict, replace

import numpy as np
import pytest

from tests.support.stores import (
    build_store,
    segment_folders,
    segment_writer,
    unprivileged,
    users_folder,
    write_rows,
)
from wanlora.commands.inspect import run
from wanlora.config import InspectConfig
from wanlora.core.buckets import Bucket
from wanlora.errors import StoreError
from wanlora.store.views import write_view

BUCKETS = (Bucket(17, 64, 64), Bucket(9, 32, 48))


def test_inspect_counts_what_is_there_and_is_json(tmp_path):
    view = build_store(tmp_path, num_clips=5, buckets=BUCKETS)
    result = run(InspectConfig(path=tmp_path, verify=True))
    assert (result.clips, result.prompts) == (5, len(view.prompt_keys()))
    assert {row["bucket"]: row["clips"] for row in result.buckets} == {
        "17x64x64": 3, "9x32x48": 2,
    }  # fmt: skip
    files = [path for path in (tmp_path / "store.zarr").rglob("*") if path.is_file()]
    assert result.bytes == sum(path.stat().st_size for path in files)
    assert result.bytes_per_clip == result.bytes / 5
    assert [row["kind"] for row in result.fingerprints] == ["latents", "text"]
    assert result.views[0]["splits"] == {"train": 4, "val": 1}
    assert (result.invalid, result.exit_code) == ([], 0)
    assert result.verified == 5 + result.prompts
    json.dumps(asdict(result))
    text = "\n".join(result.lines())
    assert "17x64x64" in text
    assert "all there" in text
    assert "vae_sha256=abababababababab" in text


def test_no_cache_names_the_command_that_makes_one(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(StoreError, match="wanlora cache-latents"):
            run(InspectConfig(path=folder))


def test_verify_lists_damaged_constant_and_lost_rows(tmp_path):
    view = build_store(tmp_path, num_clips=2)
    (bad,) = segment_folders(tmp_path, "latents")
    shard = next(path for path in bad.rglob("*") if path.name == "0" and path.is_file())
    shard.write_bytes(bytes(100))
    with segment_writer(tmp_path, "latents") as writer:
        writer.add("constant", np.ones((16, 5, 8, 8)))
    assert run(InspectConfig(path=tmp_path, statistics_clips=0)).exit_code == 0
    seen = run(InspectConfig(path=tmp_path))  # statistics read some clips
    assert (seen.exit_code, len(seen.invalid)) == (3, 2)
    result = run(InspectConfig(path=tmp_path, verify=True))
    assert result.exit_code == 3
    assert len(result.invalid) == 3
    for key in (view.clips[0].key, view.clips[1].key, "constant"):
        assert any(key in line for line in result.invalid)
    assert "wanlora cache-latents" in result.lines()[-1]


def test_a_row_that_the_disk_does_not_give_is_not_taken_for_damage_and_never_dropped():
    with users_folder() as cache:
        build_store(cache, num_clips=2)
        (folder,) = segment_folders(cache, "latents")
        shard = next(path for path in folder.rglob("*") if path.name == "0" and path.is_file())
        before = {path for path in cache.rglob("*") if path.is_file()}
        for path in cache.rglob("*"):
            path.chmod(0o777)
        shard.chmod(0)
        with unprivileged():
            verified = run(InspectConfig(path=cache, verify=True))
            with pytest.raises(StoreError, match=r"\b2 rows .*latents.*: .*0"):
                run(InspectConfig(path=cache, repair=True))
        assert {path for path in cache.rglob("*") if path.is_file()} == before
    assert (verified.exit_code, verified.invalid, len(verified.unread)) == (3, [], 2)
    text = "\n".join(verified.lines())
    assert "2 could not" in text
    assert "--repair" not in text


def test_views_that_lack_rows_or_are_damaged_are_listed(tmp_path):
    view = build_store(tmp_path, num_clips=2)
    lost = replace(view.clips[0], clip_id="lost", key="0" * 64)
    write_view(tmp_path, "more", replace(view, clips=(*view.clips, lost)))
    (tmp_path / "views" / "broken.jsonl").write_text("{")
    result = run(InspectConfig(path=tmp_path))
    assert result.exit_code == 3
    views = {row["name"]: row for row in result.views}
    assert views["more"]["missing_clips"] == ["lost"]
    assert views["default"]["missing_clips"] == []
    assert "broken.jsonl is damaged" in result.invalid[0]
    assert "MISSING 1 latents" in "\n".join(result.lines())


def test_a_damaged_commit_record_is_listed_and_the_rest_still_shown(tmp_path):
    build_store(tmp_path, num_clips=2)
    write_rows(tmp_path, "latents", ["k"])
    folder = segment_folders(tmp_path, "latents")[0]
    os.truncate(folder / "zarr.json", 30)
    result = run(InspectConfig(path=tmp_path))
    assert result.exit_code == 3
    assert folder.name in result.invalid[0]
    assert result.clips in (1, 2)
