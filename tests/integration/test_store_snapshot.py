"""What is remembered of commit records saves reading them, and dies with them."""

import json

import numpy as np
import pytest

from tests.support.stores import FINGERPRINT, LIMITS, build_store, repair_store, row_of, write_rows
from wanlora.commands.inspect.collect_garbage import collect_garbage
from wanlora.core.location import Url
from wanlora.errors import MissingRowsError, StoreError
from wanlora.store import index, schema, storage
from wanlora.store import row_reader as readers
from wanlora.store.bucket import Bucket
from wanlora.store.folder import Folder
from wanlora.store.reader import StoreReader


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Keys of the segments whose commit records are read."""
    seen: list[str] = []
    originals = {kind: kind.get for kind in (Folder, Bucket)}

    def get(self, key):
        if key.count("/") > 4 or (key.count("/") == 4 and "/text/" in key):
            seen.append(key.removesuffix(f"/{schema.GROUP}"))
        return originals[type(self)](self, key)

    for kind in originals:
        monkeypatch.setattr(kind, "get", get)
    return seen


@pytest.mark.parametrize("where", ["a folder", "memory"])
def test_only_records_written_since_the_snapshot_are_read(where, tmp_path, read):
    cache = tmp_path if where == "a folder" else Url(f"memory:///{tmp_path.name}")
    view = build_store(cache, num_clips=12)
    first = StoreReader.of_view(cache, view)
    assert len(read) == len(set(read)) == 3 + 2  # of 12 clips and 7 prompts, 4 in a segment
    first.keep_index()
    read.clear()
    again = StoreReader.of_view(cache, view)
    assert read == []
    assert again.digest == first.digest
    assert np.array_equal(again.latents(view.clips[5].key), row_of("latents", view.clips[5].key))
    write_rows(cache, "latents", ["new"])
    known = index.committed(cache, "latents", FINGERPRINT["latents"])
    assert len(read) == 1
    assert known["new"].segment == read[0]
    assert index.committed(cache, "latents", FINGERPRINT["latents"], known=known) == known
    assert len(read) == 1


def test_a_segment_that_goes_is_missed_whatever_the_snapshot_says(tmp_path):
    view = build_store(tmp_path, num_clips=12)
    StoreReader.of_view(tmp_path, view).keep_index()
    gone = index.committed(tmp_path, "latents", FINGERPRINT["latents"])[view.clips[0].key].segment
    storage.at(tmp_path).remove(f"{gone}/{schema.GROUP}")
    with pytest.raises(MissingRowsError, match="latents of 4"):
        StoreReader.of_view(tmp_path, view)


def test_a_record_that_lost_its_end_is_damage_although_its_rows_are_known(tmp_path):
    view = build_store(tmp_path, num_clips=4)
    StoreReader.of_view(tmp_path, view).keep_index()
    (segment,) = index.committed(tmp_path, "latents", FINGERPRINT["latents"]).segments
    record = tmp_path / segment / schema.GROUP
    record.write_bytes(record.read_bytes()[:-2])
    with pytest.raises(StoreError, match="1 damaged commit records"):
        StoreReader.of_view(tmp_path, view)


def test_a_collected_generation_takes_its_snapshot_with_it(tmp_path):
    view = build_store(tmp_path, num_clips=4)
    StoreReader.of_view(tmp_path, view).keep_index()
    snapshots = {kind: tmp_path / schema.snapshot_key(kind, FINGERPRINT[kind])
                 for kind in view.kinds}  # fmt: skip
    assert all(path.is_file() for path in snapshots.values())
    name = tmp_path / "views" / "default.jsonl"
    header, *_ = name.read_text().splitlines()
    name.write_text(json.dumps(json.loads(header) | {"latents": "0" * 64}) + "\n")
    collect_garbage(tmp_path, LIMITS, min_age_h=0)
    assert [path.is_file() for path in snapshots.values()] == [False, True]


def test_repair_believes_the_records_alone(tmp_path):
    view = build_store(tmp_path, num_clips=2)
    StoreReader.of_view(tmp_path, view).keep_index()
    found = repair_store(tmp_path)
    assert found == {"dropped": 0, "encoded": 0, "failures": []}
    assert not (tmp_path / schema.SNAPSHOTS).exists()


def test_arrays_that_were_closed_to_make_room_open_again(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "OPEN_ARRAYS", 1)
    view = build_store(tmp_path, num_clips=9, rows=2)
    reader = StoreReader.of_view(tmp_path, view)
    for clip in [*view.clips, *view.clips[::-1]]:
        assert np.array_equal(reader.latents(clip.key), row_of("latents", clip.key))
        assert np.array_equal(
            reader.prompt_embeds(clip.prompts[0]), row_of("text", clip.prompts[0])
        )
