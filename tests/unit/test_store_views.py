import json
from dataclasses import replace

import pytest

from tests.support.stores import build_store
from wanlora.errors import StoreError, StoreVersionError
from wanlora.store.views import read_view, view_names, write_view


def test_a_view_reads_back_as_it_was_written(tmp_path):
    written = build_store(tmp_path, num_clips=3)
    read = read_view(tmp_path, "default")
    assert read == replace(written, clips=tuple(sorted(written.clips, key=lambda c: c.clip_id)))
    assert (read.name, read.sha256) == ("default", written.sha256)


def test_bytes_of_a_view_do_not_depend_on_the_order_of_clips(tmp_path):
    view = build_store(tmp_path, num_clips=4)
    again = write_view(tmp_path, "other", replace(view, clips=view.clips[::-1]))
    assert again.sha256 == view.sha256
    assert view_names(tmp_path) == ["default", "other"]


def test_a_missing_view_names_those_there_are_and_the_command(tmp_path):
    build_store(tmp_path, num_clips=1)
    with pytest.raises(StoreError, match=r"no view 'x'.*default.*wanlora cache-latents .*--view x"):
        read_view(tmp_path, "x")


def edit_header(tmp_path, **changes):
    file = tmp_path / "views" / "default.jsonl"
    header, rest = file.read_text().split("\n", 1)
    file.write_text(json.dumps(json.loads(header) | changes) + "\n" + rest)


def test_unknown_attributes_of_a_view_are_ignored(tmp_path):
    view = build_store(tmp_path, num_clips=2)
    edit_header(tmp_path, something_new=[1, 2])
    assert read_view(tmp_path, "default") == view


def test_a_view_of_another_version_is_refused(tmp_path):
    build_store(tmp_path, num_clips=1)
    edit_header(tmp_path, version=2)
    with pytest.raises(StoreVersionError, match="version 2"):
        read_view(tmp_path, "default")


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-9], lambda data: b"\xff"])
def test_a_damaged_view_is_refused_by_name(tmp_path, damage):
    build_store(tmp_path, num_clips=1)
    file = tmp_path / "views" / "default.jsonl"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(StoreError, match=r"default\.jsonl is damaged.*wanlora cache-latents"):
        read_view(tmp_path, "default")
