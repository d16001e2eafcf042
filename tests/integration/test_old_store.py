"""A cache that release 0.1.0 wrote opens, is verified and collected as one of today."""

import shutil
from pathlib import Path

import pytest

from tests.support.stores import LIMITS, repair_store, segments_of
from wanlora.commands.inspect import run as inspect
from wanlora.commands.inspect.collect_garbage import collect_garbage
from wanlora.config import InspectConfig
from wanlora.store import schema, storage, wants
from wanlora.store.reader import StoreReader
from wanlora.store.views import read_view

FIXTURE = Path(__file__).parents[1] / "fixtures" / "v0.1.0" / "cache"


@pytest.fixture
def cache(tmp_path) -> Path:
    return shutil.copytree(FIXTURE, tmp_path / "cache")


def rows(cache: Path) -> dict[str, bytes]:
    view = read_view(cache, "default")
    reader = StoreReader.of_view(cache, view)
    found = {clip.key: reader.latents(clip.key).tobytes() for clip in view.clips}
    return found | {key: reader.prompt_embeds(key).tobytes() for key in view.prompt_keys()}


def test_records_without_a_checksum_are_read_verified_and_not_repaired(cache):
    before = rows(cache)
    view = read_view(cache, "default")
    (segment,) = segments_of(cache, "latents", view.fingerprint("latents"))
    document = storage.at(cache).get(f"{segment.key}/{schema.GROUP}")
    assert schema.has_checksum(document) is None
    found = inspect(InspectConfig(path=cache, verify="full"))
    assert (found.invalid, found.unread, found.wants, found.exit_code) == ([], [], [], 0)
    assert repair_store(cache) == {"dropped": 0, "encoded": 0, "failures": []}
    assert rows(cache) == before


def test_a_collection_keeps_every_row_and_counts_a_run_that_has_just_begun(cache):
    before = rows(cache)
    view = read_view(cache, "default")
    (cache / "views" / "default.jsonl").unlink()
    name = wants.publish(cache, view)
    freed = collect_garbage(cache, LIMITS, min_age_h=0)
    assert (freed["rows"], freed["dropped"], freed["wants"]) == (0, 0, [name])
    shutil.copy(FIXTURE / "views" / "default.jsonl", cache / "views")
    assert rows(cache) == before
