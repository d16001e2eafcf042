"""A flipped bit of any document of a cache is refused or harmless, and repair gets past it."""

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tests.support.stores import (
    FINGERPRINT,
    LIMITS,
    build_store,
    repair_store,
    row_of,
    write_rows,
)
from wanlora.commands.inspect import run as inspect
from wanlora.commands.inspect.collect_garbage import collect_garbage
from wanlora.config import InspectConfig
from wanlora.errors import CorruptRowError, StoreError, StoreVersionError, WanloraError
from wanlora.store import condemned, index, schema, storage, wants
from wanlora.store.reader import StoreReader
from wanlora.store.views import View, read_view, write_view

SAMPLE = 4
"""Bits of each document that are flipped where not all are."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, View]:
    """A small cache with everything that one can hold."""
    cache = tmp_path_factory.mktemp("damage") / "cache"
    view = build_store(cache, num_clips=2)
    StoreReader.of_view(cache, view).keep_index()
    wants.publish(cache, view)
    condemned.publish(cache, ["store.zarr/latents/0000000000000000/16x1x1x1/0000000000000000"])
    return cache, view


KINDS = {
    "store": "store.zarr/zarr.json",
    "kind": "store.zarr/latents/zarr.json",
    "encoder": "store.zarr/latents/*/zarr.json",
    "shape": "store.zarr/latents/*/*/zarr.json",
    "latents record": "store.zarr/latents/*/*/*/zarr.json",
    "text record": "store.zarr/text/*/*/zarr.json",
    "array": "store.zarr/latents/*/*/*/latent/zarr.json",
    "view": "views/*.jsonl",
    "wants": "wants/*.jsonl",
    "condemned": "condemned/*.json",
    "snapshot": "index/latents-*.npz",
}


def read_all(cache: Path, view: View) -> None:
    reader = StoreReader.of_view(cache, view)
    for clip in view.clips:
        assert np.array_equal(reader.latents(clip.key), row_of("latents", clip.key))
    for key in view.prompt_keys():
        assert np.array_equal(reader.prompt_embeds(key), row_of("text", key))


def only_refusals(work: Callable[[], object]) -> None:
    """An error is one of this project's own."""
    with suppress(WanloraError):
        work()


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def damage(whole: tuple[Path, View], pattern: str, *, plain: bool = False) -> None:
    origin, view = whole
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        shutil.copytree(origin, cache)
        if plain:
            without_snapshot(cache, plain=True)
        document = next(cache.glob(pattern), None)
        if document is None:
            pytest.skip("there is no snapshot")
        state = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
        data = state[document]
        for bit in random.Random(pattern).sample(range(8 * len(data)), SAMPLE):
            document.write_bytes(flipped(data, bit))
            look_everywhere(cache)
            if pattern.startswith("condemned"):
                document.unlink()  # what its message says
            repair_store(cache)
            write_view(cache, "default", view)  # as cache-latents does
            read_all(cache, view)
            for path in set(cache.rglob("*")) - state.keys():
                if path.is_file():
                    path.unlink()
            for path, content in state.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)


def look_everywhere(cache: Path) -> None:
    config = InspectConfig(path=cache, statistics_clips=0)
    only_refusals(lambda: read_all(cache, read_view(cache, "default")))
    only_refusals(lambda: inspect(config.model_copy(update={"verify": "fast"})))
    only_refusals(lambda: inspect(config.model_copy(update={"verify": "full"})))
    only_refusals(lambda: collect_garbage(cache, LIMITS, min_age_h=24, dry_run=True))


def without_snapshot(cache: Path, *, plain: bool) -> None:
    """Remove the snapshot; with `plain`, make the commit records what 0.1.0 wrote."""
    shutil.rmtree(cache / "index")
    if not plain:
        return
    for path in cache.rglob("zarr.json"):
        document = json.loads(path.read_bytes())
        if document.get("attributes", {}).get("wanlora", {}).pop("checksum", None):
            path.write_bytes(schema.group_document(document["attributes"]["wanlora"]))


@pytest.mark.parametrize("name", KINDS)
def test_flipped_bits_are_refused_or_harmless_and_repaired(whole, name):
    damage(whole, KINDS[name])


@pytest.mark.parametrize("name", ["latents record", "text record"])
def test_flipped_bits_of_records_without_a_checksum_too(whole, name):
    damage(whole, KINDS[name], plain=True)


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_many_flipped_bits_are_refused_or_harmless_and_repaired(whole, name, plain, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SAMPLE", 150)
    damage(whole, KINDS[name], plain=plain)


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kind", schema.KINDS)
def test_every_flipped_bit_of_a_record_is_refused_or_harmless(whole, kind, plain, tmp_path):
    cache = shutil.copytree(whole[0], tmp_path / "cache")
    without_snapshot(cache, plain=plain)
    document = next(cache.glob(KINDS[f"{kind} record"]))
    whole_record = document.read_bytes()
    undamaged = index.committed(cache, kind, FINGERPRINT[kind])
    num_harmless = 0
    for bit in range(8 * len(whole_record)):
        document.write_bytes(flipped(whole_record, bit))
        try:
            rows, damaged = index.look(cache, kind, FINGERPRINT[kind])
        except StoreVersionError:
            continue
        if not damaged:
            num_harmless += 1
            assert plain or dict(rows) == dict(undamaged)
        only_refusals(lambda: read_all(cache, whole[1]))
    document.write_bytes(whole_record)
    read_all(cache, whole[1])
    assert plain or num_harmless < 8 * len('"checksum": "01234567"')  # in the checksum itself


def spoil(cache: Path, **changes: object) -> str:
    """Change a commit record as a flipped bit might, without its checksum; its name."""
    (path,) = cache.glob("store.zarr/latents/*/*/*/zarr.json")
    own = json.loads(path.read_bytes())["attributes"]["wanlora"] | changes
    own.pop("checksum", None)
    path.write_bytes(schema.group_document(own))
    return path.parent.name


@pytest.mark.parametrize(
    "changes",
    [
        {"crc32c": {"latent": [2**32, 1]}},
        {"crc32c": {"latent": [-1, 1]}},
        {"crc32c": {"latent": [1.5, 1]}},
        {"crc32c": {"latent": [True, 1]}},
        {"crc32c": {"latent": [1, 2], "logvar": [1]}},
        {"count": 10**30},
        {"keys": ["a", "\ud800"]},
        {"keys": ["a", "b\0"]},
        {"sources": 3},
        {"sizes": {"latent/c/0/0/0/0/0": "x"}},
        {"latent_rgb": {"gram": [[1]], "cross": [[1, 2]]}},
        {"version": 3},
    ],
)
def test_a_value_out_of_range_is_one_refusal_that_names_the_record(tmp_path, changes):
    view = build_store(tmp_path, num_clips=2)
    name = spoil(tmp_path, **changes)
    with pytest.raises(StoreError, match=name) as refused:
        StoreReader.of_view(tmp_path, view)
    assert "--repair" in str(refused.value)
    assert repair_store(tmp_path)["dropped"] == 1
    read_all(tmp_path, view)


def test_log_variances_that_an_earlier_release_stored_beside_the_latents_are_ignored(tmp_path):
    view = build_store(tmp_path, num_clips=3, rows=8)
    (path,) = tmp_path.glob("store.zarr/latents/*/*/*/zarr.json")
    own = json.loads(path.read_bytes())["attributes"]["wanlora"]
    shard = path.parent / "logvar/c/0/0/0/0/0"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"values")
    own["sizes"][str(shard.relative_to(path.parent))] = len(b"values")
    spoil(tmp_path, crc32c=own["crc32c"] | {"logvar": [1, 2, 3]}, sizes=own["sizes"])
    read_all(tmp_path, view)
    assert inspect(InspectConfig(path=tmp_path, verify="full")).invalid == []
    assert repair_store(tmp_path)["dropped"] == 0
    few = write_view(tmp_path, "default", View(**{**vars_of(view), "clips": view.clips[:2]}))
    collect_garbage(tmp_path, LIMITS, min_age_h=0)
    read_all(tmp_path, few)
    assert not list(tmp_path.rglob("logvar"))


def test_a_record_of_a_newer_release_is_not_repaired_away(tmp_path):
    build_store(tmp_path, num_clips=2)
    (path,) = tmp_path.glob("store.zarr/latents/*/*/*/zarr.json")
    own = json.loads(path.read_bytes())["attributes"]["wanlora"]
    path.write_bytes(schema.commit_record(own | {"version": 2}))
    with pytest.raises(StoreVersionError, match="version 2"):
        repair_store(tmp_path)
    assert path.exists()


def test_the_other_copy_of_a_repeated_row_is_read_and_kept(tmp_path):
    view = build_store(tmp_path, num_clips=2)
    keys = [clip.key for clip in view.clips]
    write_rows(tmp_path, "latents", keys)
    first = index.committed(tmp_path, "latents", FINGERPRINT["latents"])[keys[0]].segment
    shard = next(path for path in (tmp_path / first).rglob("*") if "/c/" in path.as_posix())
    while shard.is_dir():
        shard = next(shard.iterdir())
    shard.write_bytes(shard.read_bytes()[:-8] + bytes(8))
    read_all(tmp_path, view)
    freed = collect_garbage(tmp_path, LIMITS, min_age_h=0)
    assert freed["repeats"] == 2
    assert not (tmp_path / first).exists()
    read_all(tmp_path, view)


def test_rows_are_not_dropped_if_no_copy_can_be_read(tmp_path):
    view = build_store(tmp_path, num_clips=1)
    write_rows(tmp_path, "latents", [view.clips[0].key])
    for path in tmp_path.glob("store.zarr/latents/*/*/*/latent/c/0/0/0/0/0"):
        path.write_bytes(b"damaged")
    freed = collect_garbage(tmp_path, LIMITS, min_age_h=0)
    assert freed["repeats"] == 0
    with pytest.raises(CorruptRowError, match=view.clips[0].key):
        StoreReader.of_view(tmp_path, view).latents(view.clips[0].key)


def test_a_reader_follows_rows_that_moved_and_a_row_that_is_gone_is_missing(tmp_path):
    view = build_store(tmp_path, num_clips=3, rows=8)
    reader = StoreReader.of_view(tmp_path, view)
    reader.latents(view.clips[0].key)  # its array stays open
    few = write_view(tmp_path, "default", View(**{**vars_of(view), "clips": view.clips[:2]}))
    collect_garbage(tmp_path, LIMITS, min_age_h=0)
    for clip in few.clips:
        assert np.array_equal(reader.latents(clip.key), row_of("latents", clip.key))
    assert set(reader.prompts(view.clips[0].prompts)) == set(view.clips[0].prompts)
    with pytest.raises(StoreError, match="is not in"):
        reader.latents(view.clips[2].key)


def vars_of(view: View) -> dict[str, object]:
    return {name: getattr(view, name) for name in View.__slots__}


def test_leftovers_is_collected_when_it_is_old_by_the_clock_that_dates_it(tmp_path, monkeypatch):
    """The clock of this machine may differ from that of a file server or an object store."""
    build_store(tmp_path, num_clips=1)
    storage.at(tmp_path).put("store.zarr/latents/x/16x5x8x8/s/latent/zarr.json", b"{}")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    freed = collect_garbage(tmp_path, LIMITS, min_age_h=0)
    assert freed["leftovers"] == 0
