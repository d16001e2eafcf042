"""Edits by hand: of a manifest, which `prepare` never loses, and of captions that it read."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.support import videos
from wanlora.commands import cache_latents, prepare, verify
from wanlora.commands.prepare import materialize
from wanlora.config import CacheLatentsConfig, PrepareConfig, VerifyConfig
from wanlora.data import manifest
from wanlora.data.edits import NAME, find_edits, unused_captions
from wanlora.errors import ManifestError, MediaError

SMALL = {"num_frames": 17, "height": 48, "width": 80, "workers": 1, "val_fraction": 0.0}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    for name in "abc":
        videos.write_npz(folder / f"{name}.npz", key=name)
        (folder / f"{name}.txt").write_text(f"caption {name}")
    return folder


@pytest.fixture
def out(raw, tmp_path) -> Path:
    prepared(raw, tmp_path / "out")
    return tmp_path / "out"


def prepared(raw, output, **changes):
    return prepare.run(PrepareConfig(sources=(raw,), output=output, **(SMALL | changes)))


def rows_of(out, name="train.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def write_rows(out, rows):
    (out / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def captions(out):
    return {row["source"].rpartition("/")[2]: row["prompt"] for row in rows_of(out)}


def unused(path):
    return unused_captions([path], manifest.read_all([path]))


def later(path, text):
    """Write a caption after `prepare` read it, whatever the clock's resolution."""
    path.write_text(text)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def test_an_unedited_manifest_is_written_again_without_a_question(raw, out):
    before = (out / "train.jsonl").read_bytes()
    prepared(raw, out)
    assert (out / "train.jsonl").read_bytes() == before
    (raw / "a.txt").write_text("new words")
    prepared(raw, out)
    assert captions(out)["a.npz"] == "new words"
    assert not list(out.glob("*.bak"))


def test_an_edited_manifest_is_refused_before_any_work(raw, out):
    rows = rows_of(out)
    write_rows(out, [rows[0] | {"prompt": "mine"}, *rows[1:]])
    before = (out / "train.jsonl").read_bytes()
    with pytest.raises(ManifestError, match=r"\b1 line .*, 0 added, 0 removed") as refusal:
        prepared(raw, out)
    for way in ("--edits keep", "--edits drop", "--output"):
        assert way in str(refusal.value)
    assert (out / "train.jsonl").read_bytes() == before
    assert any("--edits" in note for note in prepared(raw, out, dry_run=True).notes)


def test_kept_edits_survive_every_later_run(raw, out):
    a, b, _ = rows_of(out)
    extra = a | {"clip_id": "extra", "prompt": "a line of mine"}
    write_rows(out, [a | {"prompt": ["mine", "too"], "activity": "sit", "split": "val"}, b, extra])
    edited = (out / "train.jsonl").read_bytes()
    videos.write_npz(raw / "d.npz", key="d")
    (raw / "d.txt").write_text("caption d")
    (raw / "b.txt").write_text("caption b, better")
    for number in range(2):
        result = prepared(raw, out, edits="keep")
        assert [row["prompt"] for row in rows_of(out, "val.jsonl")] == [["mine", "too"]]
        assert rows_of(out, "val.jsonl")[0]["activity"] == "sit"
        assert sorted(row["prompt"] for row in rows_of(out)) == [
            "a line of mine", "caption b, better", "caption d",
        ]  # fmt: skip
        assert (out / ("train.jsonl.bak", "train.jsonl.2.bak")[number]).exists()
        assert re.search(r"\b1 line .*, 1 added, 1 removed", "\n".join(result.notes))
    assert (out / "train.jsonl.bak").read_bytes() == edited
    with pytest.raises(ManifestError, match="--edits keep"):
        prepared(raw, out)


def test_dropped_edits_leave_a_copy(raw, out):
    before = (out / "train.jsonl").read_bytes()
    write_rows(out, [row | {"prompt": "mine"} for row in rows_of(out)])
    edited = (out / "train.jsonl").read_bytes()
    prepared(raw, out, edits="drop")
    assert (out / "train.jsonl").read_bytes() == before
    assert (out / "train.jsonl.bak").read_bytes() == edited
    assert not find_edits(out)


def test_edits_that_cannot_be_kept_are_named(raw, out):
    rows = rows_of(out)
    write_rows(out, [rows[0] | {"prompt": 3}, *rows[1:]])
    with pytest.raises(ManifestError, match=r"train\.jsonl:1"):
        prepared(raw, out, edits="keep")
    write_rows(out, [rows[0] | {"start_s": 1.5}, *rows[1:]])
    (raw / "b.npz").unlink()
    write_rows(out, [rows[0] | {"start_s": 1.5}, rows[1] | {"prompt": "mine"}, rows[2]])
    notes = "\n".join(prepared(raw, out, edits="keep").notes)
    assert re.search(r"\b1 edited .*not made", notes)
    assert re.search(r"\b1 edited .*start", notes)


def test_a_kill_between_the_manifests_and_the_record_is_not_an_edit(raw, out, monkeypatch):
    (raw / "a.txt").write_text("new words")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("wanlora.commands.prepare.output.write_record", killed)
        with pytest.raises(KeyboardInterrupt):
            prepared(raw, out)
    assert captions(out)["a.npz"] == "new words"
    assert not find_edits(out)
    prepared(raw, out)


def test_a_manifest_of_0_1_0_is_not_replaced_unasked(tmp_path):
    release = Path("tests/fixtures/v0.1.0")
    shutil.copytree(release / "data", tmp_path / "data")
    shutil.copytree(release / "videos", tmp_path / "videos")
    before = {p.name: p.read_bytes() for p in (tmp_path / "data").glob("*.jsonl")}
    small = {"num_frames": 17, "height": 64, "width": 96, "val_fraction": 0.34}
    line = json.loads(before["train.jsonl"])
    for edited in [
        json.dumps(line | {"prompt": "mine"}),
        json.dumps(line | {"start_s": 0.5}),
        f"{json.dumps(line)}\n{json.dumps(line)}",
        json.dumps(line | {"clip_id": "mine"}),
        "{",
    ]:
        (tmp_path / "data" / "train.jsonl").write_text(edited)
        with pytest.raises(ManifestError, match=r"0\.1\.0"):
            prepared(tmp_path / "videos", tmp_path / "data", **small)
        assert (tmp_path / "data" / "train.jsonl").read_text() == edited
    for name, data in before.items():
        (tmp_path / "data" / name).write_bytes(data)
    assert unused(tmp_path / "data") == ([], "")
    prepared(tmp_path / "videos", tmp_path / "data", **small)
    assert not list((tmp_path / "data").glob("*.bak"))
    assert not find_edits(tmp_path / "data")
    new = {row["clip_id"]: row for row in rows_of(tmp_path / "data")}[line["clip_id"]]
    assert new | {"orig": line["orig"]} == line


@pytest.mark.parametrize("materialize", [None, "npz"])
def test_captions_edited_after_prepare_are_named_with_the_command(raw, out, materialize):
    if materialize:
        prepared(raw, out, materialize=materialize)
    assert unused(out) == ([], "")
    later(raw / "a.txt", "new words")
    later(raw / "b.txt", " caption b\n")  # touched, and still the same
    found, command = unused(out / "train.jsonl")
    assert found == [f"{raw / 'a.txt'}: 'new words'"]
    assert command.startswith(f"wanlora prepare {raw} --output {out} ")
    assert "--num-frames 17" in command
    result = verify.run(VerifyConfig(manifests=(out,), model="none/here"))
    assert list(result.unused_captions) == found
    assert command in "\n".join(result.lines())
    prepared(raw, out, materialize=materialize)
    assert unused(out) == ([], "")


def test_stage_one_names_them_too(raw, out, tmp_path, micro_home):
    later(raw / "a.txt", "new words")
    result = cache_latents.run(
        CacheLatentsConfig(
            manifest=(out,), cache=tmp_path / "cache", model="micro", device="cpu", dry_run=True
        )
    )
    assert result.unused_captions == [f"{raw / 'a.txt'}: 'new words'"]
    assert result.captions_command in "\n".join(result.lines())


def test_a_caption_whose_line_was_edited_by_hand_is_not_compared(raw, out):
    write_rows(out, [row | {"prompt": "mine"} for row in rows_of(out)])
    later(raw / "a.txt", "new words")
    assert unused(out) == ([], "")


def test_an_edited_table_is_named_and_sidecars_are_not_when_a_table_was_given(raw, tmp_path):
    table = tmp_path / "list.csv"
    table.write_text("path,text\n" + "".join(f"{name}.npz,{name}\n" for name in "abc"))
    prepared(raw, tmp_path / "out", captions=table)
    later(raw / "a.txt", "new words")
    assert unused(tmp_path / "out") == ([], "")
    table.write_text(table.read_text() + "\n")
    found, command = unused(tmp_path / "out")
    assert found == [str(table)]
    assert f"--captions {table}" in command


def test_a_prefix_is_no_difference(raw, tmp_path):
    prepared(raw, tmp_path / "out", caption_prefix="ohwx dog,")
    later(raw / "a.txt", "caption a")
    assert unused(tmp_path / "out") == ([], "")


def test_a_damaged_record_refuses_rather_than_loses(raw, out):
    (out / NAME).write_text("{")
    a, *others = rows_of(out)
    write_rows(out, [a | {"prompt": "mine"}, *others])
    with pytest.raises(ManifestError, match="--edits"):
        prepared(raw, out)
    assert rows_of(out)[0]["prompt"] == "mine"


def test_a_weight_and_a_repeated_line_are_edits_that_are_kept(raw, out):
    a, b, c = rows_of(out)
    write_rows(out, [a | {"weight": 2.5}, b, b, c])
    with pytest.raises(ManifestError, match="2 lines changed"):
        prepared(raw, out)
    prepared(raw, out, edits="keep")
    assert [row.get("weight", 1) for row in rows_of(out)] == [2.5, 2, 1]


def test_a_clip_that_was_not_written_out_is_not_taken_for_a_removed_line(raw, out, monkeypatch):
    load = materialize.load_unchanged

    def failing(clip, known):
        if clip.path.name == "b.npz":
            raise MediaError("missing", f"{clip.path} is gone")
        return load(clip, known)

    with monkeypatch.context() as patch:
        patch.setattr(materialize, "load_unchanged", failing)
        assert prepared(raw, out, materialize="npz").clips == 2
    assert not find_edits(out)
    assert prepared(raw, out, materialize="npz").clips == 3
