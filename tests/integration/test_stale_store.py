"""A store that does not hold what is asked for is refused, with the way to get it."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.support.stores import (
    FINGERPRINT,
    PROVENANCE,
    build_store,
    encodings,
    open_rows,
    open_store,
    segment_folders,
    write_rows,
)
from wanlora.core.fingerprint import fingerprint
from wanlora.errors import MissingRowsError, StaleStoreError, StoreError, StoreVersionError
from wanlora.store import schema
from wanlora.store.index import committed, provenances
from wanlora.store.reader import StoreReader
from wanlora.store.views import Encoding
from wanlora.store.writer import SegmentWriter


def test_a_cache_made_with_other_weights_is_refused_with_the_diff_and_the_command(tmp_path):
    build_store(tmp_path, num_clips=2)
    wanted = PROVENANCE["latents"] | {"vae_sha256": "ef" * 32, "tf32": True}
    with pytest.raises(StaleStoreError) as caught:
        StoreReader(tmp_path, encodings=encodings("text") | {"latents": Encoding.of(wanted)})
    message = str(caught.value)
    assert "tf32: found False, wanted True" in message
    assert "vae_sha256: found abab" in message
    assert "latents_mean" not in message  # only what differs
    assert f"wanlora cache-latents --cache {tmp_path}" in message


def test_a_cache_without_text_says_so(tmp_path):
    write_rows(tmp_path, "latents", ["k"])
    with pytest.raises(StaleStoreError, match="no text with"):
        open_store(tmp_path)


def test_no_cache_at_all_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(StoreError, match="wanlora cache-latents --cache"):
        open_store(tmp_path / "nothing")


def test_missing_rows_are_refused_by_number_with_the_first_names(tmp_path):
    view = build_store(tmp_path, num_clips=3)
    extra = tuple(replace(view.clips[0], clip_id=f"new-{i}", key=f"{i}") for i in range(7))
    bigger = replace(view, clips=view.clips + extra, empty_prompt="gone")
    with pytest.raises(MissingRowsError) as caught:
        StoreReader.of_view(tmp_path, bigger)
    message = str(caught.value)
    assert "7 clips (new-0, new-1, new-2, new-3, new-4 and 2 more)" in message
    assert "1 prompt (gone)" in message
    assert "wanlora cache-latents" in message
    reader = open_store(tmp_path)
    assert reader.missing("latents", ["3", view.clips[0].key, "1"]) == ["3", "1"]
    assert reader.missing("text", ["gone"]) == ["gone"]
    with pytest.raises(MissingRowsError, match=r"row 3\b"):
        reader.latents("3")


def test_generations_of_encoders_live_side_by_side(tmp_path):
    build_store(tmp_path, num_clips=2)
    other = PROVENANCE["latents"] | {"tf32": True}
    with SegmentWriter(
        tmp_path, kind="latents", provenance=other, shape=(16, 5, 8, 8), dtype="float16",
        rows=2, max_bytes=2**20, max_seconds=9.0,
    ) as writer:  # fmt: skip
        writer.add("k", np.ones((16, 5, 8, 8)))
    assert provenances(tmp_path, "latents") == {
        FINGERPRINT["latents"]: PROVENANCE["latents"], fingerprint(other): other,
    }  # fmt: skip
    assert set(committed(tmp_path, "latents", fingerprint(other))) == {"k"}
    assert "k" not in committed(tmp_path, "latents", FINGERPRINT["latents"])


def edit(path, **changes):
    document = json.loads(path.read_bytes())
    own = document["attributes"]["wanlora"] | changes
    path.write_bytes(
        schema.commit_record(own) if own.get("kind") == "segment" else schema.group_document(own)
    )


def test_a_store_of_another_version_is_neither_read_nor_written(tmp_path):
    build_store(tmp_path, num_clips=1)
    edit(tmp_path / "store.zarr" / "zarr.json", version=7)
    with pytest.raises(StoreVersionError, match="version 7"):
        open_store(tmp_path)
    with pytest.raises(StoreVersionError, match="version 7"):
        write_rows(tmp_path, "latents", ["k"])


def test_a_segment_of_another_version_is_refused(tmp_path):
    build_store(tmp_path, num_clips=1)
    edit(segment_folders(tmp_path, "latents")[0] / "zarr.json", version=2)
    with pytest.raises(StoreVersionError, match="version 2"):
        open_store(tmp_path)


def test_unknown_attributes_are_ignored(tmp_path):
    view = build_store(tmp_path, num_clips=1)
    edit(tmp_path / "store.zarr" / "zarr.json", later={"x": 1})
    edit(segment_folders(tmp_path, "latents")[0] / "zarr.json", later=[1])
    assert StoreReader.of_view(tmp_path, view).latents(view.clips[0].key).shape == (16, 5, 8, 8)


def test_a_segment_moved_under_another_fingerprint_is_refused(tmp_path):
    write_rows(tmp_path, "latents", ["k"])
    edit(segment_folders(tmp_path, "latents")[0] / "zarr.json", fingerprint="0" * 64)
    with pytest.raises(StoreError, match="damaged commit record"):
        open_rows(tmp_path, "latents")


def test_a_provenance_changed_by_hand_is_refused(tmp_path):
    build_store(tmp_path, num_clips=1)
    short = FINGERPRINT["latents"][:16]
    edit(tmp_path / "store.zarr" / "latents" / short / "zarr.json", provenance={"other": 1})
    with pytest.raises(StoreError, match="changed by hand"):
        open_store(tmp_path)


def test_a_folder_that_is_no_cache_is_refused(tmp_path):
    (tmp_path / "store.zarr").mkdir()
    (tmp_path / "store.zarr" / "zarr.json").write_text('{"zarr_format": 3, "attributes": {}}')
    with pytest.raises(StoreError, match=r"damaged .*latent cache"):
        open_store(tmp_path)
