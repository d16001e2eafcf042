"""Storage: the same promises in a folder, in an object store, and in an object store in memory."""

import pytest

from wanlora.core.location import Url, parse
from wanlora.errors import StoreError
from wanlora.store import bucket, storage
from wanlora.store.storage import Storage


class StorageSuite:
    """Tests that each kind of storage inherits."""

    @pytest.fixture
    def kept(self) -> Storage:
        raise NotImplementedError

    @pytest.fixture
    def filled(self, kept) -> Storage:
        for key in ("a/one", "a/b/two", "c/three"):
            kept.put(key, key.encode())
        return kept

    def test_an_object_is_read_as_it_was_last_written(self, kept):
        assert kept.get("a/none") is None
        for data in (b"", b"first", b"second" * 1000):
            kept.put("a/one", data)
            assert kept.get("a/one") == data

    def test_objects_are_read_in_order_and_missing_ones_are_none(self, filled):
        keys = ["c/three", "a/none", "a/one", "c/three"]
        assert list(filled.get_many(keys)) == [b"c/three", None, b"a/one", b"c/three"]

    def test_names_directly_under_a_key(self, filled):
        assert (filled.folders("a"), filled.files("a")) == (["b"], ["one"])
        assert (filled.folders("nothing"), filled.files("nothing")) == ([], [])
        assert filled.folders("a/one") == []  # an object, not a folder

    def test_a_key_is_not_a_prefix_of_other_names(self, filled):
        filled.put("ab/four", b"")
        assert set(filled.listing("a")) == {"a/one", "a/b/two"}
        filled.remove_tree("a")
        assert set(filled.listing("")) == {"ab/four", "c/three"}

    def test_sizes_of_one_name_in_each_folder(self, filled):
        assert filled.sizes_in_folders("a", "two") == {"b": 7}
        assert filled.sizes_in_folders("a", "one") == {}
        assert filled.sizes_in_folders("nothing", "one") == {}

    def test_a_listing_has_sizes_and_times_by_the_clock(self, filled):
        found = filled.listing("a")
        assert {key: entry.num_bytes for key, entry in found.items()} == {"a/one": 5, "a/b/two": 7}
        assert all(abs(filled.clock() - entry.written) < 600 for entry in found.values())
        assert set(filled.listing("")) == {"a/one", "a/b/two", "c/three"}  # nothing of the clock's

    def test_what_does_not_exist_can_be_removed(self, filled):
        filled.remove_many([])
        filled.remove("a/none")
        filled.remove("none/at/all")
        filled.remove_tree("nothing")
        filled.remove_trees(["nothing", "a/nothing"])
        filled.remove_empty_folders("nothing")
        assert len(filled.listing("")) == 3

    def test_removed_objects_are_gone(self, filled):
        filled.remove("a/one")
        assert list(filled.listing("a")) == ["a/b/two"]
        filled.remove_many(["a/b/two", "a/none"])
        assert filled.get("a/b/two") is None
        assert list(filled.listing("")) == ["c/three"]

    @pytest.mark.parametrize("num_trees", [2, bucket.FEW + 4])
    def test_trees_are_removed_and_their_neighbours_stay(self, kept, num_trees):
        trees = [f"top/{number:02d}" for number in range(num_trees)]
        for tree in [*trees, "top/99", "other/00"]:
            kept.put(f"{tree}/object", b"")
        kept.remove_trees(trees)
        assert set(kept.listing("")) == {"top/99/object", "other/00/object"}

    def test_empty_folders_go_and_full_ones_stay(self, filled):
        filled.remove("a/b/two")
        filled.remove_empty_folders("a")
        assert (filled.folders("a"), filled.files("a")) == ([], ["one"])

    def test_an_array_is_opened_by_its_key(self, kept):
        import numpy as np
        import zarr

        memory: dict = {}
        zarr.create_array(zarr.storage.MemoryStore(memory), name="x", data=np.arange(3))
        for name, buffer in memory.items():
            kept.put(f"group/{name}", buffer.to_bytes())
        opened = zarr.open_array(kept.zarr_store(), path="group/x", mode="r")
        assert opened[...].tolist() == [0, 1, 2]


class TestFolder(StorageSuite):
    @pytest.fixture
    def kept(self, tmp_path):
        return storage.at(tmp_path / "cache")

    def test_a_refusal_names_the_path_and_the_option(self, tmp_path):
        (tmp_path / "cache").touch()
        with pytest.raises(StoreError, match=rf"cannot write {tmp_path}/cache/a: .*--cache"):
            storage.at(tmp_path / "cache").put("a", b"")


@pytest.mark.filterwarnings("ignore:.*ObjectStore.*:UserWarning")
class TestMemory(StorageSuite):
    @pytest.fixture
    def kept(self, tmp_path):
        return storage.at(Url(f"memory:///{tmp_path.name}"))


@pytest.mark.filterwarnings("ignore:.*ObjectStore.*:UserWarning")
class TestBucket(StorageSuite):
    @pytest.fixture
    def kept(self, s3):
        bucket.open_store.cache_clear()
        return storage.at(parse(s3))
