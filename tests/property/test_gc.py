"""A collection takes no row that anybody needs, whatever it runs beside and however it is timed."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.stores import (
    FINGERPRINT,
    LIMITS,
    build_store,
    repair_store,
    row_of,
    segment_writer,
    write_rows,
)
from tests.support.turns import Turns
from wanlora.commands.inspect.collect_garbage import collect_garbage
from wanlora.core.fingerprint import sha256_text
from wanlora.errors import StoreError
from wanlora.store import index, wants
from wanlora.store.folder import Folder
from wanlora.store.maintenance import garbage
from wanlora.store.reader import StoreReader
from wanlora.store.views import View, read_view, write_view

KEYS = tuple(sha256_text(f"row {i}") for i in range(6))
"""The first four are committed and named by nothing when the actors begin."""


@pytest.fixture(autouse=True, scope="module")
def no_minimum_age_of_leftovers():
    """What is half-written may be collected at once: only the protocol protects it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(garbage, "LITTER_AGE_S", 0.0)
        yield


def start(cache: Path) -> View:
    """A store whose segments hold rows of a view beside rows that nothing names."""
    view = build_store(cache, num_clips=2, rows=8)
    with segment_writer(cache, "latents", rows=4) as writer:
        for key in (view.clips[0].key, *KEYS[:3]):
            writer.add(key, row_of("latents", key))
    write_rows(cache, "latents", [view.clips[1].key, KEYS[3]])
    return view


def view_of(first: View, name: str, keys: tuple[str, ...]) -> View:
    clips = tuple(replace(first.clips[0], clip_id=key[:6], key=key) for key in keys)
    return replace(first, name=name, clips=clips)


def stage_one(cache: Path, view: View) -> Callable[[], None]:
    """The order of `cache-latents`: wants, look, rows, view."""

    def run() -> None:
        earlier = wants.names(cache, view.name)
        wanted = wants.publish(cache, view)
        keys = [clip.key for clip in view.clips]
        missing = index.missing_keys(cache, "latents", view.fingerprint("latents"), keys)
        with segment_writer(cache, "latents", rows=2) as writer:
            for key in missing:
                writer.add(key, row_of("latents", key))
        StoreReader.of_view(cache, view)
        write_view(cache, view.name, view)
        wants.drop(cache, {wanted, *earlier})

    return run


def gc(cache: Path, age_h: float) -> Callable[[], None]:
    def run() -> None:
        try:
            collect_garbage(cache, LIMITS, min_age_h=age_h)
        except StoreError as error:
            if "has begun on" not in str(error):
                raise

    return run


def repair(cache: Path) -> Callable[[], None]:
    def run() -> None:
        try:
            assert repair_store(cache)["encoded"] == 0
        except StoreError as error:
            if "has begun on" not in str(error):
                raise

    return run


def reading(cache: Path, view: View) -> Callable[[], None]:
    reader = StoreReader.of_view(cache, view)

    def run() -> None:
        for _ in range(3):
            check(reader, view)

    return run


def check(reader: StoreReader, view: View) -> None:
    for clip in view.clips:
        assert np.array_equal(reader.latents(clip.key), row_of("latents", clip.key))


SCENES = MappingProxyType(
    {
        "one writer": ("writer", "gc"),
        "two writers": ("writer", "other", "gc"),
        "two collections": ("writer", "gc", "gc again"),
        "a reader": ("reader", "writer", "gc"),
        "repair": ("writer", "gc", "repair", "reader"),
    }
)


def play(scene: str, schedule: list[int], age_h: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        first = start(cache)
        views = {
            "writer": view_of(first, "writer", KEYS[1:5]),
            "other": view_of(first, "other", KEYS[3:]),
        }
        everybody = {name: stage_one(cache, view) for name, view in views.items()} | {
            "gc": gc(cache, age_h),
            "gc again": gc(cache, age_h),
            "repair": repair(cache),
            "reader": reading(cache, first),
        }
        turns = Turns({name: everybody[name] for name in SCENES[scene]}, schedule)
        turns.run()
        assert not turns.errors, turns.errors
        for view in (first, *(views[name] for name in SCENES[scene] if name in views)):
            check(StoreReader.of_view(cache, view), view)
        assert collect_garbage(cache, LIMITS, min_age_h=0)["wants"] == []
        for name in ("default", *(name for name in SCENES[scene] if name in views)):
            check(StoreReader.of_view(cache, read_view(cache, name)), read_view(cache, name))
        assert not list((cache / "condemned").glob("*"))


schedules = st.lists(st.integers(0, 3), max_size=120)
ages = st.sampled_from([0.0, 1e-6, 24.0])


@pytest.mark.parametrize("scene", SCENES)
@settings(max_examples=4, deadline=None)
@given(schedule=schedules, age_h=ages)
def test_no_row_that_a_view_or_a_run_needs_is_lost(scene, schedule, age_h):
    play(scene, schedule, age_h)


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
@settings(max_examples=200, deadline=None)
@given(schedule=schedules, age_h=ages)
def test_no_row_is_lost_in_any_of_many_schedules(scene, schedule, age_h):
    play(scene, schedule, age_h)


def points(cache: Path, work: Callable[[], None], at: int, then: Callable[[], None]) -> bool:
    """Do something before the at-th object that work writes; whether there was one."""
    calls, put = [], Folder.put

    def watched(self: Folder, key: str, data: bytes) -> None:
        calls.append(None)
        if len(calls) == at + 1:
            Folder.put = put
            then()
        put(self, key, data)

    Folder.put = watched
    try:
        work()
    finally:
        Folder.put = put
    return len(calls) > at


def test_gc_at_every_object_that_a_writer_publishes(tmp_path):
    at = 0
    while True:
        cache = tmp_path / str(at)
        view = view_of(start(cache), "writer", KEYS[1:5])
        if not points(cache, stage_one(cache, view), at, gc(cache, 0.0)):
            break
        check(StoreReader.of_view(cache, view), view)
        at += 1
    assert at == 1 + 3 + 1  # wants, one segment of three objects, the view


def test_rows_of_an_unfinished_run_stay_until_they_are_given_up(tmp_path):
    first = start(tmp_path)
    view = view_of(first, "writer", KEYS[1:5])
    name = wants.publish(tmp_path, view)
    freed = collect_garbage(tmp_path, LIMITS, min_age_h=0)
    assert freed["wants"] == [name]
    assert index.missing_keys(tmp_path, "latents", FINGERPRINT["latents"], KEYS) == [
        KEYS[0], *KEYS[4:],
    ]  # fmt: skip
    with pytest.raises(StoreError, match=name):
        collect_garbage(tmp_path, LIMITS, min_age_h=0, drop_wants=("another",))
    freed = collect_garbage(tmp_path, LIMITS, min_age_h=0, drop_wants=(name,))
    assert (freed["rows"], freed["wants"]) == (3, [])
    assert wants.names(tmp_path) == []
    check(StoreReader.of_view(tmp_path, first), first)
