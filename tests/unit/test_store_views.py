import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.stores import build_store
from wanlora.core.buckets import Bucket
from wanlora.errors import StoreError, StoreVersionError
from wanlora.store.captions import clips_of
from wanlora.store.views import frame_rate, read_view, view_names, write_view

RELEASE_0_1_0 = Path(__file__).parents[1] / "fixtures" / "v0.1.0"


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


@pytest.fixture
def old(tmp_path):
    """A cache of release 0.1.0, whose view has no frame rates and no weights."""
    return Path(shutil.copytree(RELEASE_0_1_0 / "cache", tmp_path / "cache"))


def pinned_by_the_old_run():
    state = RELEASE_0_1_0 / "run" / "checkpoints" / "step-000002" / "state.json"
    return json.loads(state.read_text())["identity"]["view_sha256"]


def test_a_view_of_0_1_0_opens_with_the_defaults_and_is_written_with_the_same_bytes(old):
    file = old / "views" / "default.jsonl"
    data = file.read_bytes()
    view = read_view(old, "default")
    assert {(clip.fps, clip.weight) for clip in view.clips} == {(16.0, 1.0)}
    written = write_view(old, "default", view)
    assert file.read_bytes() == data
    assert view.sha256 == written.sha256 == hashlib.sha256(data).hexdigest()
    assert view.sha256 == pinned_by_the_old_run()


def test_frame_rates_leave_the_identity_that_a_run_of_0_1_0_pinned_and_weights_do_not(old):
    view = read_view(old, "default")
    faster = replace(view, clips=tuple(replace(clip, fps=24.0) for clip in view.clips))
    assert write_view(old, "default", faster).sha256 == pinned_by_the_old_run()
    read = read_view(old, "default")
    assert (read, read.sha256) == (faster, pinned_by_the_old_run())

    first, *others = faster.clips
    heavier = write_view(old, "default", replace(view, clips=(replace(first, weight=2.5), *others)))
    read = read_view(old, "default")
    assert read.clips[0].weight == 2.5
    assert read.sha256 == heavier.sha256 != pinned_by_the_old_run()


@pytest.mark.parametrize("field", ["fps", "weight"])
@pytest.mark.parametrize("value", ["0", "-1", "NaN", "Infinity", '"much"', "[1]", "null"])
def test_a_frame_rate_or_weight_that_is_not_positive_is_damage(tmp_path, field, value):
    build_store(tmp_path, num_clips=1)
    file = tmp_path / "views" / "default.jsonl"
    header, line, _ = file.read_text().split("\n")
    file.write_text(f'{header}\n{line[:-1]},"{field}":{value}}}\n')
    with pytest.raises(StoreError, match=r"default\.jsonl is damaged.*wanlora cache-latents"):
        read_view(tmp_path, "default")


def test_the_frame_rate_of_a_view_is_that_of_most_clips_and_of_images_only_if_nothing_moves(
    tmp_path,
):
    clip = build_store(tmp_path, num_clips=1).clips[0]
    video, image = clip.bucket, Bucket(1, 64, 64)
    rates = [(image, 16.0)] * 5 + [(video, 24.0)] * 2 + [(video, 30.0)]
    clips = [replace(clip, bucket=bucket, fps=fps) for bucket, fps in rates]
    assert frame_rate(clips) == 24.0
    assert frame_rate(clips[:5]) == 16.0


def test_clips_of_one_caption_take_turns_and_held_out_ones_come_first(tmp_path):
    view = build_store(tmp_path, num_clips=5)
    splits = ("train", "val", "val", "train", "train")
    captions = (("a",), ("a",), ("b", "a"), ("c",), ("a",))
    clips = tuple(
        replace(clip, clip_id=str(index), split=split, prompts=prompts, activity="walk")
        for index, (clip, split, prompts) in enumerate(
            zip(view.clips, splits, captions, strict=True)
        )
    )

    def found(*keys: str | None) -> str:
        wanted = [("walk", key) for key in keys]
        chosen = clips_of(replace(view, clips=clips), "val", wanted)
        return "".join(clip.clip_id for clip in chosen)

    assert found("a", "a", "a") == "121"
    assert found("b", "a", "b") == "212"
    assert found("c") == "3"  # no held-out clip has it
    assert found(None, None, None) == "121"
