"""A view names the kinds of rows that it needs; every kind is stored and kept by the same code."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.support.stores import (
    FINGERPRINT,
    LIMITS,
    build_store,
    open_rows,
    repair_store,
    row_of,
    segment_folders,
)
from wanlora.commands.inspect.collect_garbage import collect_garbage
from wanlora.errors import MissingRowsError, StaleStoreError
from wanlora.store import wants
from wanlora.store.reader import StoreReader
from wanlora.store.schema import KINDS
from wanlora.store.views import read_view, write_view

ALL = tuple(KINDS)
T2V = ("latents", "text")


def test_rows_of_every_kind_are_read_back_through_a_view(tmp_path):
    view = build_store(tmp_path, num_clips=3, kinds=ALL)
    found = read_view(tmp_path, "default")
    assert found == view
    assert found.kinds == ALL
    reader = StoreReader.of_view(tmp_path, found)
    read = {
        "latents": reader.latents,
        "text": reader.prompt_embeds,
        "cond_latents": reader.cond_latents,
        "clip_vision": reader.clip_vision,
    }
    for kind in ALL:
        for key in found.keys(kind):
            assert np.array_equal(read[kind](key), row_of(kind, key)), kind


def test_a_view_without_image_conditions_has_the_same_bytes_as_before(tmp_path):
    build_store(tmp_path, num_clips=1)
    header = json.loads((tmp_path / "views" / "default.jsonl").read_text().splitlines()[0])
    assert header.keys() == {
        "format", "version", "latents", "text", "latents_provenance", "text_provenance", "model",
        "variant", "shift", "empty_prompt", "negative_prompt", "validation_prompts",
    }  # fmt: skip


def test_a_run_reads_only_the_kinds_it_needs(tmp_path):
    view = build_store(tmp_path, num_clips=2, kinds=ALL)
    for kind in ("cond_latents", "clip_vision"):
        for segment in segment_folders(tmp_path, kind):
            (segment / "zarr.json").unlink()
    with pytest.raises(MissingRowsError, match=r"cond_latents of 2 clips \(clip-000, clip-001\)"):
        StoreReader.of_view(tmp_path, view)
    few = StoreReader.of_view(tmp_path, view, T2V)
    assert few.digest == StoreReader.of_view(tmp_path, _without_images(view)).digest


def test_a_view_without_a_needed_kind_is_refused_with_the_command_that_adds_it(tmp_path):
    view = build_store(tmp_path, num_clips=1)
    with pytest.raises(StaleStoreError, match=r"cond_latents.*cache-latents.*--model"):
        StoreReader.of_view(tmp_path, view, ("latents", "cond_latents"))


@pytest.mark.parametrize("protected", ["view", "wants"])
def test_a_collection_keeps_every_kind_that_a_view_or_a_list_names_and_no_other(
    tmp_path, protected
):
    view = build_store(tmp_path, num_clips=3, kinds=ALL)
    few = replace(view, clips=view.clips[:1])
    if protected == "wants":
        wants.publish(tmp_path, few)
        few = _without_images(few)
    write_view(tmp_path, "default", few)
    collect_garbage(tmp_path, LIMITS, min_age_h=0, drop_wants=(), dry_run=False)
    for kind in ("latents", "cond_latents", "clip_vision"):
        assert set(open_rows(tmp_path, kind).rows) == {view.clips[0].key}
    wants.drop(tmp_path, wants.names(tmp_path))
    write_view(tmp_path, "default", _without_images(few))
    collect_garbage(tmp_path, LIMITS, min_age_h=0, drop_wants=(), dry_run=False)
    assert not open_rows(tmp_path, "cond_latents").rows
    assert not open_rows(tmp_path, "clip_vision").rows
    assert set(open_rows(tmp_path, "latents").rows) == {view.clips[0].key}


@pytest.mark.parametrize("kind", ["cond_latents", "clip_vision"])
def test_repair_encodes_only_the_damaged_row_of_a_kind_again(tmp_path, kind):
    view = build_store(tmp_path, num_clips=4, kinds=ALL)
    (segment,) = segment_folders(tmp_path, kind)
    shard = segment / KINDS[kind].array / "c" / "/".join(["0"] * len(KINDS[kind].dimensions))
    data = bytearray(shard.read_bytes())
    data[20] ^= 255
    shard.write_bytes(data)
    assert repair_store(tmp_path) == {"dropped": 1, "encoded": 1, "failures": []}
    rows = open_rows(tmp_path, kind)
    assert all(np.array_equal(rows.read(k), row_of(kind, k)) for k in view.keys(kind))
    assert len(open_rows(tmp_path, "latents").rows) == 4


def _without_images(view):
    return replace(view, encodings={kind: view.encodings[kind] for kind in T2V})


def test_fingerprints_of_kinds_differ():
    assert len(set(FINGERPRINT.values())) == len(KINDS)
