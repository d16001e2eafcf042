"""A cache in an object store behaves as one in a folder: moto's S3 server on loopback."""

import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from functools import partial

import numpy as np
import obstore
import pytest

from tests.support import cli
from tests.support.s3 import failing_proxy, slow_proxy
from tests.support.stores import (
    build_store,
    keys_from,
    open_rows,
    row_of,
    segment_writer,
    write_rows,
)
from wanlora.core.location import Url, parse
from wanlora.errors import CorruptRowError, StoreError
from wanlora.store import bucket, storage
from wanlora.store.reader import StoreReader
from wanlora.store.views import read_view

pytestmark = pytest.mark.filterwarnings(
    # zarr's word on its adapter; what this project asks of it is tested here.
    "ignore:.*ObjectStore.*:UserWarning"
)


@pytest.fixture
def cache(s3) -> Url:
    bucket.open_store.cache_clear()
    return parse(s3)


def test_rows_views_and_the_index_are_the_same_as_in_a_folder(cache, tmp_path):
    there, here = build_store(cache, num_clips=6), build_store(tmp_path, num_clips=6)
    assert there.sha256 == here.sha256
    reader = StoreReader.of_view(cache, read_view(cache, "default"))
    for clip in there.clips:
        assert np.array_equal(reader.latents(clip.key), row_of("latents", clip.key))
    for key in there.prompt_keys():
        assert np.array_equal(reader.prompt_embeds(key), row_of("text", key))


def test_a_damaged_object_in_a_bucket_names_its_row_and_a_dead_server_is_not_damage(
    cache, monkeypatch
):
    view = build_store(cache, num_clips=2)
    shard = next(k for k in storage.at(cache).listing("store.zarr/latents") if "/latent/c/" in k)
    data = bytearray(storage.at(cache).get(shard))
    data[len(data) // 3] ^= 4
    storage.at(cache).put(shard, bytes(data))
    reader = open_rows(cache, "latents")
    messages = []
    for clip in view.clips:
        try:
            reader.read(clip.key)
        except CorruptRowError as error:
            messages.append(str(error))
    assert messages
    assert all(f"wanlora inspect {cache} --repair" in message for message in messages)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(bucket, "MAX_RETRIES", 0)
    bucket.open_store.cache_clear()
    with pytest.raises(StoreError, match=r"cannot [\s\S]*AWS_ENDPOINT_URL") as refused:
        open_rows(cache, "latents")
    assert not isinstance(refused.value, CorruptRowError)


def test_a_read_that_fails_is_repeated(cache, s3_port, monkeypatch):
    view = build_store(cache, num_clips=4)
    with failing_proxy(s3_port, every=4) as (port, counts):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        bucket.open_store.cache_clear()
        reader = StoreReader.of_view(cache, view)
        for clip in view.clips:
            assert np.array_equal(reader.latents(clip.key), row_of("latents", clip.key))
    assert counts[1] >= 3, counts


def test_killed_writers_leave_whole_segments_or_nothing(cache):
    for start in range(3):
        writers = [
            cli.server().start(
                partial(write_rows, cache, "latents", keys_from(20 * start + 5 * i), rows=2),
                environment=os.environ | cli.ENVIRONMENT,
            )
            for i in range(2)
        ]
        deadline = time.monotonic() + 300
        known = len(storage.at(cache).listing("store.zarr"))
        while len(storage.at(cache).listing("store.zarr")) < known + 12:
            assert time.monotonic() < deadline
            time.sleep(0.02 * (start + 1))
        for writer in writers:
            writer.kill()
            assert writer.wait() == -signal.SIGKILL
    reader = open_rows(cache, "latents")
    assert len(reader.rows) >= 12
    for key in reader.rows:
        assert np.array_equal(reader.read(key), row_of("latents", key))
    assert len(reader.rows.row_keys) == 2 * len(reader.rows.segments)


def test_a_local_copy_fetches_each_row_once_and_heals_itself(cache, tmp_path, monkeypatch):
    view = build_store(cache, num_clips=6, rows=3)
    folder = tmp_path / "copy"
    StoreReader.of_view(cache, view, local_copy=folder)
    assert not folder.exists()  # nothing before it is read
    reader = StoreReader.of_view(cache, view, local_copy=folder)
    with counted_bytes(monkeypatch) as seen:
        assert np.array_equal(
            reader.latents(view.clips[0].key), row_of("latents", view.clips[0].key)
        )
        assert sum(seen) < 1.2 * row_of("latents", "k").nbytes + 4000  # not the whole segment
    for clip in view.clips:
        reader.latents(clip.key)
    again = StoreReader.of_view(cache, view, local_copy=folder)
    with counted_bytes(monkeypatch) as seen:
        for clip in view.clips:
            assert np.array_equal(again.latents(clip.key), row_of("latents", clip.key))
        assert seen == []
        for damage in (b"damaged", b"", None):
            row = next(path for path in sorted(folder.rglob("*.latent")))
            data = bytearray(row.read_bytes())
            data[-1] ^= 1
            row.write_bytes(bytes(data) if damage is None else damage)
            for clip in view.clips:
                assert np.array_equal(again.latents(clip.key), row_of("latents", clip.key))
    assert len(list(folder.rglob("*.latent"))) == len(view.clips)
    assert not list((folder / ".partial").iterdir())


@contextmanager
def counted_bytes(monkeypatch):
    """Sizes of what zarr reads."""
    from zarr.storage import ObjectStore

    seen, original = [], ObjectStore.get

    async def get(self, *arguments, **options):
        found = await original(self, *arguments, **options)
        seen.append(0 if found is None else len(found))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "get", get)
        yield seen


def through(monkeypatch, port, **limits):
    """Send requests to a port of this machine, with other limits than the default ones."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for name, value in limits.items():
        monkeypatch.setattr(bucket, name, value)
    bucket.open_store.cache_clear()


def test_a_large_object_travels_in_parts_each_with_its_own_timeout(
    cache, s3_port, monkeypatch
):  # fmt: skip
    data = np.random.default_rng(0).bytes(36_000_000)
    with slow_proxy(s3_port, 10e6) as port:  # 3.6 s for the object, 1 s for two parts
        through(monkeypatch, port, REQUEST_S=3, PART_BYTES=5 * 2**20, PARTS_AT_ONCE=2)
        storage.at(cache).put("large", data)
        assert storage.at(cache).get("large") == data
        through(monkeypatch, port, PART_BYTES=2**40, MAX_RETRIES=0)
        with pytest.raises(StoreError, match="3 s") as refused:
            storage.at(cache).put("whole", data)
    assert "MB/s" in str(refused.value)
    assert "AWS_ACCESS_KEY_ID" not in str(refused.value)


def test_an_object_that_is_replaced_while_it_is_read_is_read_whole(cache, monkeypatch):
    old, new = b"o" * 5000, b"n" * 6000
    storage.at(cache).put("view", old)
    parts, calls = bucket._get_in_parts, []

    def replaced(*arguments):
        calls.append(None)
        if len(calls) == 1:
            obstore.put(bucket.open_store(cache), "view", new)
        return parts(*arguments)

    monkeypatch.setattr(bucket, "PART_BYTES", 1000)
    monkeypatch.setattr(bucket, "_get_in_parts", replaced)
    assert storage.at(cache).get("view") == new
    assert len(calls) == 2


def test_many_objects_are_removed_with_one_request(cache, s3_port, monkeypatch):
    keys = [f"many/{i}" for i in range(30)]
    for key in keys:
        storage.at(cache).put(key, b"x")
    with failing_proxy(s3_port, every=10**9) as (port, counts):
        through(monkeypatch, port)
        storage.at(cache).remove_many([*keys, "many/none"])
    assert counts[0] == 1
    assert storage.at(cache).listing("many") == {}


def test_stage_one_inspect_and_train_take_an_address(
    s3, micro_home, npz_manifest, tmp_path, cache_fp16
):  # fmt: skip
    made = cli.invoke("cache-latents", "--manifest", npz_manifest, "--cache", s3, "--model",
                      "micro", "--set", "text_dtype=float32")  # fmt: skip
    assert made.exit_code == 0, made.output
    assert f"wanlora train --cache {s3}" in made.output
    here = read_view(cache_fp16, "default")
    there = read_view(parse(s3), "default")
    assert [clip.key for clip in there.clips] == [clip.key for clip in here.clips]
    ours, theirs = (
        StoreReader.of_view(root, view) for root, view in ((cache_fp16, here), (parse(s3), there))
    )
    for clip in here.clips:
        assert np.array_equal(ours.latents(clip.key), theirs.latents(clip.key))
    again = cli.invoke("cache-latents", "--manifest", npz_manifest, "--cache", s3, "--model",
                       "micro", "--set", "text_dtype=float32", "--json")  # fmt: skip
    assert json.loads(again.stdout)["clips_encoded"] == 0
    looked = cli.invoke("inspect", s3, "--verify", "--html", tmp_path / "page.html", "--json")
    assert looked.exit_code == 0, looked.output
    assert json.loads(looked.stdout)["invalid"] == []
    freed = cli.invoke("inspect", s3, "--gc")
    assert freed.exit_code == 0, freed.output
    train = ("train", "--model", "micro", "--max-steps", 2, "--device", "cpu", "--output-dir")
    copied = tmp_path / "copy"
    for folder, arguments in (("far", ()), ("near", ("--local-copy", copied))):
        done = cli.invoke(*train, tmp_path / folder, "--cache", s3, *arguments)
        assert done.exit_code == 0, done.output
    assert list(copied.rglob("*.latent"))


def test_without_obstore_the_message_says_what_to_install(monkeypatch):
    bucket.open_store.cache_clear()
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    assert "pip install 'wanlora[s3]'" in cli.refuses("inspect", "s3://bucket/x")
    bucket.open_store.cache_clear()


def test_a_segment_writer_may_write_to_memory():
    with segment_writer(Url("memory:///"), "latents") as writer:
        writer.add("k", row_of("latents", "k"))
    assert np.array_equal(open_rows(Url("memory:///"), "latents").read("k"), row_of("latents", "k"))
